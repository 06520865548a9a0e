// The substitute of CUtensorMap: 128 opaque bytes that cuTensorMapEncodeTiled fills and tensor copies read.
#pragma once
#include <cstdint>

namespace vgpu {

struct TensorMap {
  uint64_t magic;
  uint64_t address;
  uint64_t dim[5];       // elements, innermost first
  uint64_t stride[5];    // bytes; stride[0] is the element
  uint16_t box[5];
  uint8_t rank, element_bytes, swizzle, unused;  // swizzle: 0, 1, 2, 3 for none, 32, 64, 128 bytes
  uint32_t checksum;
};
static_assert(sizeof(TensorMap) <= 128, "fits a CUtensorMap");
constexpr uint64_t kTensorMapMagic = 0x70616d726f736e74;
uint32_t checksum(const TensorMap &map);

// cuTensorMapEncodeTiled (CUDA driver API 6.30 "Tensor Map Object Management") with all of its documented limits.
int encode_tiled(void *map, int type, uint32_t rank, void *address, const uint64_t *dim, const uint64_t *strides, const uint32_t *box,
                 const uint32_t *element_strides, int interleave, int swizzle, int l2, int fill);

}  // namespace vgpu
