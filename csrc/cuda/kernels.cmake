# The CUDA kernels as object libraries in `target`: *_sm90.cu for sm90_architectures, all others for portable_architectures, with
# further compiler options.
function(add_cuda_kernels target portable_architectures sm90_architectures)
  file(GLOB portable_sources CONFIGURE_DEPENDS ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/*.cu)
  set(sm90_sources ${portable_sources})
  list(FILTER sm90_sources INCLUDE REGEX "_sm90\\.cu$")
  list(FILTER portable_sources EXCLUDE REGEX "_sm90\\.cu$")
  foreach(part portable sm90)
    if(${part}_sources)
      add_library(mixtral_cuda_${part} OBJECT ${${part}_sources})
      set_target_properties(mixtral_cuda_${part} PROPERTIES CUDA_ARCHITECTURES "${${part}_architectures}"
                            CUDA_VISIBILITY_PRESET hidden)
      target_compile_options(mixtral_cuda_${part} PRIVATE -lineinfo ${ARGN})
      target_link_libraries(${target} PRIVATE mixtral_cuda_${part})
    endif()
  endforeach()
endfunction()
