"""The drop-in inside transformers' own Mixtral and Mistral, against their eager implementation."""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, CompileConfig, DynamicCache, MistralConfig, MixtralConfig, StaticCache
from transformers.masking_utils import sliding_window_causal_mask_function

import mixtral_ext
from mixtral_ext.integrations import transformers as integration
from op_calls import float_on

VOCAB = 101
FAMILIES = ["mixtral", "mistral"]
WINDOWS = [None, 1, 4, 12, 40]  # prompts are 12 to 16 tokens long


@pytest.fixture(scope="module", autouse=True)
def registered():
    integration.register()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are tiny: on a busy machine, two threads spend their time waiting
    yield
    torch.set_num_threads(threads)


def make_model(family, window, head_dim=64):
    """A seeded two-layer model on the eager implementations. Weights large enough for clear-cut tokens and routing."""
    common = dict(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        sliding_window=window,
        max_position_embeddings=256,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    experts = dict(num_local_experts=4, num_experts_per_tok=2, experts_implementation="eager")
    config = MistralConfig(**common) if family == "mistral" else MixtralConfig(**common, **experts)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def ours(model, attention="mixtral_ext"):
    """A copy on our ops, or on our experts and an attention of torch's."""
    model = copy.deepcopy(model)
    model.set_attn_implementation(attention)
    if model.config.model_type == "mixtral":
        model.set_experts_implementation("mixtral_ext")
        assert model.config._experts_implementation == "mixtral_ext"
    assert model.config._attn_implementation == attention
    return model


def prompts(padding, lengths=(16, 9, 12)):
    """input_ids and attention_mask, [B, max length] on one side or one more on both."""
    size = max(lengths) + (padding == "both")
    ids, mask = torch.zeros(len(lengths), size, dtype=torch.long), torch.zeros(len(lengths), size, dtype=torch.long)
    generator = torch.Generator().manual_seed(1)
    for b, length in enumerate(lengths):
        first = {"right": 0, "left": size - length, "both": (size - length) // 2}[padding]
        ids[b, first : first + length] = torch.randint(2, VOCAB, (length,), generator=generator)
        mask[b, first : first + length] = 1
    return ids, mask


def assert_same(actual, expected):
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error <= 2e-5, f"relative error {error}"


def assert_no_worse(actual, low, exact):
    """At most twice the error of transformers' own implementation in the same dtype."""
    error, limit = ((t.double() - exact).norm() / exact.norm() for t in (actual, low))
    assert error <= 2 * limit + 1e-6, f"relative error {error}, eager's {limit}"


def is_clear(router_logits, top_k=2):
    """Tokens whose experts stay the same when hidden and logits are rounded to bf16."""
    top = router_logits.double().topk(top_k + 1, -1).values
    return top[..., top_k - 1] - top[..., top_k] > 0.06 * router_logits.double().std()


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("padding", ["left", "right", "both"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits(family, padding, window):
    model = make_model(family, window)
    ids, mask = prompts(padding)
    with torch.inference_mode():
        expected = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        assert_same(ours(model)(input_ids=ids, attention_mask=mask).logits[mask.bool()], expected)
        assert_same(ours(model)(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()], expected)


@pytest.mark.parametrize("window", [None, 5])
def test_head_dim_128(window):
    model = make_model("mixtral", window, head_dim=128)
    ids, mask = prompts("left")
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        assert_same(ours(model)(input_ids=ids, attention_mask=mask).logits[mask.bool()], expected)


CACHES = {
    "dynamic": {},
    "dynamic_unsized": {},  # a DynamicCache that was not told of the window keeps all keys
    "static": {"cache_implementation": "static"},
    "none": {"use_cache": False},
    "chunked_prefill": {"prefill_chunk_size": 5},
    "chunked_prefill_static": {"prefill_chunk_size": 5, "cache_implementation": "static"},
    "beams": {"num_beams": 2},
}


@pytest.mark.parametrize("window", [None, 4, 12, 40])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_generate(family, cache, window):
    """A batch of unequal prompts: the same tokens, and the same logits at every step."""
    model = make_model(family, window)
    ids, mask = prompts("left")
    results = []
    for candidate in (model, ours(model)):
        arguments = dict(CACHES[cache])
        if cache == "dynamic_unsized":
            arguments["past_key_values"] = DynamicCache()
        results.append(
            candidate.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=14,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
                **arguments,
            )
        )
    expected, actual = results
    assert torch.equal(actual.sequences, expected.sequences)
    assert actual.sequences.shape == (3, 30)
    assert_same(torch.stack(actual.logits), torch.stack(expected.logits))


@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
def test_generate_with_window_1(cache):
    """Against eager without a cache: transformers' dynamic cache keeps all keys then, and eager attends to them."""
    model = make_model("mixtral", 1)
    ids, mask = prompts("left")
    arguments = dict(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert torch.equal(ours(model).generate(**arguments, **CACHES[cache]), model.generate(**arguments, use_cache=False))


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("static", [False, True])
def test_generate_one_prompt_without_a_mask(static, window):
    model = make_model("mixtral", window)
    ids = prompts("left")[0][:1]
    arguments = dict(max_new_tokens=10, do_sample=False, **({"cache_implementation": "static"} if static else {}))
    assert torch.equal(ours(model).generate(ids, **arguments), model.generate(ids, **arguments))


def test_generate_with_a_compiled_step():
    """transformers compiles the decoding step of a static cache where it runs on a GPU; here it is told to."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return graph

    model = make_model("mixtral", None)
    ids, mask = prompts("left")
    compiled = CompileConfig(backend=backend, mode=None, dynamic=False, fullgraph=True)
    compiled._compile_all_devices = True
    arguments = dict(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False, cache_implementation="static")
    torch._dynamo.reset()
    tokens = ours(model).generate(**arguments, compile_config=compiled)
    assert torch.equal(tokens, model.generate(**arguments))
    assert len(graphs) == 1 and all(graphs[0].count(f"{op}(") == 2 for op in ("moe_experts", "sliding_window_attention"))


@pytest.mark.parametrize("attention", ["mixtral_ext", "sdpa"])
def test_generate_with_a_compiled_step_in_bf16(attention, device):
    """Same tokens as without compilation, from one graph."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return graph

    model = ours(make_model("mixtral", None), attention).to(device, torch.bfloat16)
    ids, mask = (t.to(device) for t in prompts("left"))
    compiled = CompileConfig(backend=backend, mode=None, dynamic=False, fullgraph=True)
    compiled._compile_all_devices = True
    arguments = dict(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False, cache_implementation="static")
    torch._dynamo.reset()
    tokens = model.generate(**arguments, compile_config=compiled)
    assert torch.equal(tokens, model.generate(**arguments, disable_compile=True))
    assert len(graphs) == 1 and graphs[0].count("moe_experts(") == 2
    assert graphs[0].count("sliding_window_attention(") == (2 if attention == "mixtral_ext" else 0)


def step_by_step(model, ids, mask, cache, chunks):
    """Logits of feeding ids in chunks, with the mask of all tokens so far."""
    logits, first = [], 0
    with torch.no_grad():
        for size in chunks:
            out = model(
                input_ids=ids[:, first : first + size],
                attention_mask=mask[:, : first + size],
                position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, first : first + size],
                past_key_values=cache,
            )
            logits.append(out.logits)
            first += size
    return torch.cat(logits, 1)


@pytest.mark.parametrize("chunks", [(16,), (1,) * 16, (5, 5, 5, 1), (3, 1, 1, 8, 3)])
@pytest.mark.parametrize("window", [None, 1, 4, 7])
@pytest.mark.parametrize("static", [False, True])
def test_chunks(static, window, chunks):
    """Any chunking gives what eager gives for the whole prompt without a cache."""
    model = make_model("mistral", window)
    ids, mask = prompts("left")
    cache = StaticCache(config=model.config, max_cache_len=20) if static else DynamicCache(config=model.config)
    logits = step_by_step(ours(model), ids, mask, cache, chunks)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    assert_same(logits[mask.bool()], expected[mask.bool()])


def test_scaling_of_the_module():
    model = make_model("mistral", 5)
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.31
    ids, mask = prompts("right")
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        assert_same(ours(model)(input_ids=ids, attention_mask=mask).logits[mask.bool()], expected)


def test_key_ranges():
    """(first key, number of keys) by hand: 3 new tokens after 6 seen, one sequence padded by 2, one by 7 tokens."""
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[1, :2] = mask[2, :7] = False
    sliding = dict(local_size=4, mask_function=sliding_window_causal_mask_function(4))

    def ranges(*sizes, **arguments):
        result = integration.key_ranges(3, *sizes, **arguments)
        return None if result is None else (result.dtype, result.shape, result[:, 0, 0].tolist())

    def expected(*pairs):
        return torch.int32, (3, 1, 1, 2), [list(pair) for pair in pairs]

    assert ranges(3, 9, q_offset=6) is None
    assert ranges(3, 9, q_offset=6, attention_mask=mask[:1].expand(3, -1)) is None
    assert ranges(3, 9, q_offset=6, attention_mask=mask) == expected((0, 9), (2, 7), (7, 2))
    assert ranges(3, 20, q_offset=torch.tensor(6), attention_mask=mask) == expected((0, 9), (2, 7), (7, 2))  # static cache
    assert ranges(3, 20, q_offset=torch.tensor(6)) == expected((0, 9), (0, 9), (0, 9))
    # A window of 4 in a cache that keeps tokens 3 and later: the first query sees tokens 3 to 6.
    assert ranges(3, 6, q_offset=6, kv_offset=3, attention_mask=mask, **sliding) == expected((0, 6), (0, 6), (4, 2))
    assert ranges(3, 6, q_offset=6, kv_offset=3, attention_mask=mask[:1].expand(3, -1), **sliding) is None
    # A compiled step always gets ranges, even where they say nothing.
    assert ranges(3, 9, q_offset=6, allow_is_causal_skip=False) == expected((0, 9), (0, 9), (0, 9))
    whole = mask[:1].expand(3, -1)
    assert ranges(3, 9, q_offset=6, attention_mask=whole, allow_is_causal_skip=False) == expected((0, 9), (0, 9), (0, 9))


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("window", [None, 1, 4, 40])
def test_decoding_after_right_padding(window, static):
    """Padding between tokens is refused at every step, also when the window has passed it."""
    model = make_model("mixtral", window)
    ids, mask = prompts("right", lengths=(8, 6))
    ids, mask = torch.cat([ids, ids[:, :6] + 1], 1), torch.cat([mask, torch.ones(2, 6, dtype=torch.long)], 1)

    def cache():
        return StaticCache(config=model.config, max_cache_len=20) if static else DynamicCache(config=model.config)

    for chunks in ((8, 1), (13,)):  # a step after the prompt; the prompt and 5 new tokens at once
        with pytest.raises(ValueError, match="padding between tokens .*pad prompts on the left"):
            step_by_step(ours(model), ids, mask, cache(), chunks)
    # Positions 6 and 7 of the second prompt are padding; a query at 11 with window 4 sees 8 and later.
    filled = cache()
    step_by_step(model, ids, mask, filled, (11,))
    with pytest.raises(ValueError, match="padding between tokens"):
        ours(model)(input_ids=ids[:, 11:12], attention_mask=mask[:, :12], past_key_values=filled)
    with pytest.raises(ValueError, match="padding between tokens"):
        ours(model).generate(ids[:, :8], attention_mask=mask[:, :8], max_new_tokens=3, do_sample=False)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("window", [None, 4])
def test_left_padding_that_the_window_has_passed(window, static):
    """Decoding goes on however far the padding lies behind, and a longer mask (room in the cache) changes nothing."""
    model = make_model("mistral", window)
    ids, mask = prompts("left", lengths=(12, 10))
    longer = torch.nn.functional.pad(mask, (0, 5))
    logits = []
    for candidate, whole in ((model, False), (ours(model), False), (ours(model), True)):
        cache = StaticCache(config=model.config, max_cache_len=17) if static else DynamicCache(config=model.config)
        with torch.no_grad():
            rows = [
                candidate(
                    input_ids=ids[:, i : i + 1],
                    attention_mask=longer if whole else mask[:, : i + 1],
                    position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, i : i + 1],
                    past_key_values=cache,
                ).logits
                for i in range(12)
            ]
        logits.append(torch.cat(rows, 1)[mask.bool()])
    assert_same(logits[1], logits[0])
    assert_same(logits[2], logits[0])


def test_finished_sequences_may_be_masked():
    """A 0 for a new token means that its row is not used, not that the mask has a hole."""
    model = make_model("mistral", None)
    ids, mask = prompts("right", lengths=(8, 6))
    logits = [step_by_step(m, ids, mask, DynamicCache(), (6, 1, 1))[mask.bool()] for m in (model, ours(model))]
    assert_same(logits[1], logits[0])


def test_sequence_of_padding_only():
    model = make_model("mixtral", None)
    ids, mask = prompts("left", lengths=(5, 0))
    with torch.no_grad():
        logits = ours(model)(input_ids=ids, attention_mask=mask).logits
        expected = model(input_ids=ids, attention_mask=mask).logits
    assert_same(logits[0], expected[0])
    assert logits.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_error(family, device):
    """Logits of given tokens are no further from float64 than twice eager's own error in bf16."""
    model = make_model(family, 24).to(device)
    if family == "mixtral":
        for layer in model.model.layers:
            layer.mlp.gate.weight.data *= 8  # clear-cut routing: rounding hardly ever changes an expert
    ids = torch.randint(2, VOCAB, (8, 64), generator=torch.Generator().manual_seed(2)).to(device)
    low = copy.deepcopy(model).bfloat16()
    with torch.no_grad():
        expected = copy.deepcopy(low).double()(input_ids=ids).logits
        errors = [(m(input_ids=ids).logits.double() - expected).norm() / expected.norm() for m in (low, ours(low))]
    assert 0 < errors[1] <= 2 * errors[0]


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("attention", ["mixtral_ext", "sdpa"])
def test_bf16_error_of_clear_sequences(attention, window, device):
    """Sequences in which rounding is likely to change an expert are left out."""
    model = make_model("mixtral", window).bfloat16().to(device)
    ids = torch.randint(2, VOCAB, (256, 12), generator=torch.Generator().manual_seed(2)).to(device)
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        routers = torch.stack(exact(input_ids=ids, output_router_logits=True).router_logits)
        ids = ids[is_clear(routers).view(-1, *ids.shape).all(0).all(1)]
        assert len(ids) >= 16
        assert_no_worse(ours(model, attention)(input_ids=ids).logits, model(input_ids=ids).logits, exact(input_ids=ids).logits)


@torch.no_grad()
def exact_logits(model, ids, mask):
    """Of the tokens that are not padding: float64, each prompt by itself (eager's rows of padding are NaN in float64)."""
    exact = copy.deepcopy(model).double()
    return torch.cat([exact(input_ids=row[seen][None]).logits[0] for row, seen in zip(ids, mask.bool())])


LOW = pytest.mark.parametrize("head_dim, dtype", [(64, torch.bfloat16), (128, torch.float16)], ids=["bf16", "f16"])


@LOW
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("padding", ["left", "right", "both"])
def test_error_with_padding(padding, window, head_dim, dtype, device):
    model = make_model("mistral", window, head_dim).to(device, dtype)
    ids, mask = (t.to(device) for t in prompts(padding))
    with torch.no_grad():
        actual, low = (m(input_ids=ids, attention_mask=mask).logits[mask.bool()] for m in (ours(model), model))
    assert_no_worse(actual, low, exact_logits(model, ids, mask))


@LOW
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("static", [False, True])
def test_error_through_a_cache(static, window, head_dim, dtype, device):
    """Our logits of chunks and single tokens, beside eager's of the whole prompts without a cache."""
    model = make_model("mistral", window, head_dim).to(device, dtype)
    ids, mask = (t.to(device) for t in prompts("left"))
    cache = StaticCache(config=model.config, max_cache_len=20) if static else DynamicCache(config=model.config)
    actual = step_by_step(ours(model), ids, mask, cache, (7, 6, 1, 1, 1))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        low = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    assert_no_worse(actual[mask.bool()], low[mask.bool()], exact_logits(model, ids, mask))


@pytest.mark.gpu
@pytest.mark.parametrize("static", [False, True])
def test_attention_waits_for_nothing(static):
    """The mask is looked at once per forward pass, before the layers."""
    query, key, value = (torch.randn(3, heads, n, 64, device="cuda").bfloat16() for heads, n in ((4, 5), (2, 24), (2, 24)))
    mask = prompts("left", lengths=(16, 9, 12) if static else (24, 9, 12))[1].cuda()
    ranges = integration.key_ranges(3, 5, 24, q_offset=mask.shape[1] - 5, attention_mask=mask)
    first, _ = integration.attention(SimpleNamespace(), query, key, value, ranges, sliding_window=6)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again, _ = integration.attention(SimpleNamespace(), query, key, value, ranges, sliding_window=6)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, again) and first.abs().sum() > 0


@pytest.mark.parametrize("window", [None, 6])
def test_keys_and_values_are_not_copied(monkeypatch, window, device):
    """The op reads the cache's own memory, and nothing on the way copies a tensor of more than B elements."""
    op, pointers = mixtral_ext.sliding_window_attention, []

    def recorded(q, k, v, **arguments):
        pointers.append((q.data_ptr(), k.data_ptr(), v.data_ptr()))
        return op(q, k, v, **arguments)

    monkeypatch.setattr(mixtral_ext, "sliding_window_attention", recorded)
    dtype = float_on(device)
    query = torch.randn(3, 5, 4, 64, device=device, dtype=dtype).transpose(1, 2)  # as a projection leaves it
    key, value = torch.randn(2, 3, 2, 24, 64, device=device, dtype=dtype)  # a static cache
    ids, mask = (t.to(device) for t in prompts("left"))
    ranges = integration.key_ranges(3, 5, 24, q_offset=torch.tensor(11), attention_mask=mask.bool())
    ranges = ranges.contiguous()  # as generate does
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        integration.attention(SimpleNamespace(), query, key, value, ranges, sliding_window=window)
    assert pointers == [(query.data_ptr(), key.data_ptr(), value.data_ptr())]
    copies = [e for e in profile.events() if e.name in ("aten::copy_", "aten::clone", "aten::_to_copy")]
    assert all(e.input_shapes[0] == [3] for e in copies), [(e.name, e.input_shapes) for e in copies]

    model = ours(make_model("mistral", window)).to(device, dtype)
    cache = StaticCache(config=model.config, max_cache_len=16)
    step_by_step(model, ids, mask, cache, (15, 1))
    assert [p[1:] for p in pointers[-2:]] == [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]


# ------------------------------------------------------------------------------------------------------------ refusals


def call_attention(head_dim=64, mask=None, **arguments):
    q, kv = torch.zeros(1, 2, 3, head_dim), torch.zeros(1, 1, 3, head_dim)
    return integration.attention(SimpleNamespace(is_causal=True), q, kv, kv, mask, **arguments)


@pytest.mark.parametrize(
    "name, value",
    [
        ("dropout", 0.1),
        ("softcap", 30.0),
        ("s_aux", torch.zeros(2)),
        ("position_bias", torch.zeros(1, 2, 3, 3)),
        ("output_attentions", True),
        ("is_causal", False),
        ("cache", object()),
        ("cu_seq_lens_q", torch.zeros(2, dtype=torch.int32)),
        ("mask", torch.zeros(1, 1, 3, 3)),
        ("mask", torch.ones(1, 1, 3, 3, dtype=torch.bool)),
    ],
)
def test_attention_refuses_by_name(name, value):
    call_attention()
    with pytest.raises(ValueError, match={"mask": "attention_mask", "is_causal": "causal"}.get(name, name)):
        call_attention(**{name: value})


def test_other_head_dims_are_refused():
    with pytest.raises(Exception, match="64 or 128.*got.*32"):
        call_attention(head_dim=32)


def test_masks_that_cannot_be_honoured_are_refused():
    model = ours(make_model("mixtral", 8))
    ids, mask = prompts("left")
    holes = mask.clone()
    holes[:, 12] = 0
    for bad, message in (
        (holes, "padding between tokens"),
        (torch.zeros(3, 1, 16, 16), "prepared masks"),
        (torch.ones(3, 1, 16, 16, dtype=torch.bool), "prepared masks"),
        (mask[:, None], "2-D attention_mask"),
        (mask[:, :10], "attention_mask of 16 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            model(input_ids=ids, attention_mask=bad)
    with pytest.raises(ValueError, match="packed sequences"):
        model(input_ids=ids[:1], position_ids=torch.tensor([[*range(7), *range(9)]]), use_cache=False)


@pytest.mark.parametrize("window", [None, 8])
def test_bidirectional_attention_is_refused(window):
    model = ours(make_model("mistral", window))
    model.config.is_causal = False
    with pytest.raises(ValueError, match="bidirectional"):
        model(input_ids=prompts("left")[0])


def test_output_attentions_is_refused():
    model = ours(make_model("mistral", None))
    with pytest.raises(ValueError, match="output_attentions"):
        model(input_ids=prompts("left")[0], output_attentions=True)


def test_training_raises_in_backward():
    model = ours(make_model("mixtral", None))
    loss = model(input_ids=prompts("left")[0]).logits.sum()
    with pytest.raises(RuntimeError, match="mixtral_ext"):
        loss.backward()


# ------------------------------------------------------------------------------------------------------------ register


def test_register_again_and_load_by_name(tmp_path):
    integration.register()
    integration.register()
    model = make_model("mixtral", 6)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, experts_implementation="mixtral_ext", attn_implementation="mixtral_ext"
    )
    ids, mask = prompts("left")
    with torch.inference_mode():
        expected = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        assert_same(loaded(input_ids=ids, attention_mask=mask).logits[mask.bool()], expected)


def test_older_transformers_is_refused(monkeypatch):
    monkeypatch.setattr(integration, "sdpa_mask", lambda batch_size, cache_position: None)
    with pytest.raises(ImportError, match="q_offset"):
        integration.register()
