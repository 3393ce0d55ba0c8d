"""Numbers on a CUDA device: fast paths against plain ones, in half precision, at the shapes of Molmo2."""

import copy

import pytest
import torch
from golden_cases import CASES, build_model, load_case
from inputs import enliven, lively_model, video_inputs
from speed.shapes import build_models, make_inputs
from test_golden import expected_features
from test_modeling_molmo2_stts import labels_of

import modeling_stts.modeling_molmo2_stts as modeling
import modeling_stts.modeling_molmo2_stts_vision as vision_tower
from hub_upload.tiny import tiny_config, tiny_model
from modeling_stts import (
    Molmo2SttsConfig,
    Molmo2SttsForConditionalGeneration,
    Molmo2SttsModel,
    Molmo2SttsVideoProcessor,
)
from modeling_stts.stts_attention import MAX_BATCH_SIZE
from modeling_stts.stts_scorer import SttsScorer


pytestmark = pytest.mark.gpu


def to_cuda(inputs):
    return {name: value.cuda() for name, value in inputs.items()}


def relative_error(ours, reference):
    return ((ours.double() - reference.double()).norm() / reference.double().norm()).item()


@pytest.fixture
def in_bins(monkeypatch):
    """Switches variable-length attention off."""
    return lambda: monkeypatch.setattr(vision_tower, "can_attend_in_segments", lambda hidden_states: False)


@pytest.fixture(scope="module")
def real_vit():
    """A ViT and connector of Molmo2-4B's shapes with 8 of its 25 blocks, and an unused language model."""
    torch.manual_seed(0)
    config = Molmo2SttsConfig(
        vision_config={"num_hidden_layers": 8},
        adapter_config={"vision_feature_layer": [7, 5], "intermediate_size": 9728, "text_hidden_size": 2560},
        text_config={
            "hidden_size": 64,
            "num_hidden_layers": 1,
            "vocab_size": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    )
    return Molmo2SttsModel(config).cuda().bfloat16().eval()


def real_video(num_frames):
    generator = torch.Generator("cuda").manual_seed(num_frames)
    return {
        "pixel_values_videos": torch.randn(num_frames, 729, 588, generator=generator, device="cuda"),
        "video_token_pooling": _pooling(num_frames),
        "video_grids": torch.tensor([[num_frames, 9, 9]]),
    }


def _pooling(num_frames):
    windows = torch.arange(729).view(9, 3, 9, 3).permute(0, 2, 1, 3).reshape(81, 9)
    return (torch.arange(num_frames).view(-1, 1, 1) * 729 + windows).view(-1, 9).cuda()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("refill", [True, False])
def test_golden_vectors_in_float32(case, refill):
    case = load_case(case)
    with torch.no_grad():
        video = build_model(case, refill=refill).cuda().get_video_features(**to_cuda(case.inputs()))
    ours = torch.cat(video.pooler_output).cpu()
    torch.testing.assert_close(ours, expected_features(case, refill), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prune_ratio", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("num_frames", [2, 17])
@pytest.mark.parametrize("refill", [False, True])
def test_varlen_equals_bins_in_bfloat16(real_vit, in_bins, prune_ratio, num_frames, refill):
    real_vit.config.stts_config.refill = refill
    with torch.no_grad():
        varlen = real_vit.get_video_features(**real_video(num_frames), prune_ratio=prune_ratio)
        in_bins()
        bins = real_vit.get_video_features(**real_video(num_frames), prune_ratio=prune_ratio)
    real_vit.config.stts_config.refill = False
    assert torch.equal(varlen.keep_masks[0], bins.keep_masks[0])
    assert relative_error(varlen.pooler_output[0], bins.pooler_output[0]) < 1e-2


@pytest.mark.parametrize("path", ["varlen", "bins"])
def test_gradients_in_bfloat16_are_near_float32(real_vit, in_bins, path):
    # Random scores are the same in both precisions, so both keep the same windows.
    models = [copy.deepcopy(real_vit).train(), copy.deepcopy(real_vit).float().train()]
    video = real_video(6)
    for model in models:
        model.config.stts_config.method = "random"
        if path == "bins":
            in_bins()
        model.get_video_features(**video, prune_ratio=0.5).pooler_output[0].float().square().mean().backward()
    for (name, ours), (_, reference) in zip(*(model.named_parameters() for model in models)):
        # A key bias shifts all logits of a query alike: its gradient is zero but for rounding.
        if reference.grad is not None and not name.endswith("k_proj.bias"):
            assert relative_error(ours.grad, reference.grad) < 5e-2, name


@pytest.mark.parametrize("path", ["varlen", "bins"])
def test_chunks_change_little_in_bfloat16(real_vit, in_bins, path):
    # Random scores are the same however they round, so both keep the same windows.
    if path == "bins":
        in_bins()
    model, video = copy.deepcopy(real_vit), real_video(17)
    model.config.stts_config.method = "random"
    with torch.no_grad():
        expected = model.get_video_features(**video, prune_ratio=0.8)
        model.config.stts_config.vision_chunk_frames = 5
        chunked = model.get_video_features(**video, prune_ratio=0.8)
    assert torch.equal(chunked.keep_masks[0], expected.keep_masks[0])
    assert relative_error(chunked.pooler_output[0], expected.pooler_output[0]) < 1e-2


def test_2048_frames_at_80_percent_on_80_gb():
    """A whole prompt through Molmo2-4B's shapes; needs a device with 80 GB and nothing else on it."""
    _, model = build_models("4b", torch.device("cuda"), torch.bfloat16)
    model.config.stts_config.position_ids = "compact"
    model.config.stts_config.vision_chunk_frames = 128
    inputs = make_inputs(model.config, 2048, 1, torch.device("cuda"))
    video = {name: inputs[name] for name in ("pixel_values_videos", "video_token_pooling", "video_grids")}
    with torch.no_grad():
        torch.cuda.reset_peak_memory_stats()
        features = model.get_video_features(**video, prune_ratio=0.8).pooler_output[0]
        vision_peak = torch.cuda.max_memory_allocated()
        outputs = model(**inputs, prune_ratio=0.8, logits_to_keep=1)
    peak = torch.cuda.max_memory_allocated()
    print(f"2,048 frames: {vision_peak / 2**30:.1f} GiB in the vision part, {peak / 2**30:.1f} GiB in all")
    assert features.shape == (2048 * 81 - int(2048 * 81 * 0.8), 2560)
    assert torch.isfinite(features).all() and torch.isfinite(outputs.logits).all()
    assert vision_peak < 30 * 2**30
    assert peak < 74 * 2**30


def test_more_windows_than_one_batch_of_attention_takes():
    scorer = SttsScorer(64, 4, 16, 64).cuda().bfloat16()
    windows = torch.randn(MAX_BATCH_SIZE // 81 + 2, 81, 9, 64, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        scores, first = scorer(windows, [len(windows)]), scorer(windows[:10], [10])
    torch.testing.assert_close(scores[:10], first)
    assert scores.shape == windows.shape[:2] and scores.isfinite().all()


def test_bfloat16_features_are_near_float32(real_vit):
    reference = copy.deepcopy(real_vit).float()
    video = real_video(6)
    with torch.no_grad():
        ours, expected = (model.get_video_features(**video, prune_ratio=0.5) for model in (real_vit, reference))
    agreement = (ours.keep_masks[0] == expected.keep_masks[0]).float().mean()
    assert agreement > 0.95
    kept_in_both = ours.keep_masks[0].bool() & expected.keep_masks[0].bool()
    rows = [kept_in_both[mask.keep_masks[0].bool()] for mask in (ours, expected)]
    assert relative_error(ours.pooler_output[0][rows[0]], expected.pooler_output[0][rows[1]]) < 5e-2


@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
def test_attention_implementations_agree(implementation):
    config = tiny_config()
    for part in (config.vision_config, config.adapter_config, config.text_config):
        part.head_dim = 16  # flex attention has no smaller heads
    model = enliven(Molmo2SttsForConditionalGeneration(config).eval()).cuda()
    inputs = to_cuda(video_inputs((4, 2)))
    with torch.no_grad():
        expected = model(**inputs)
        model.set_attn_implementation(implementation)
        logits = model(**inputs).logits
    real = expected.kept_token_idx >= 0
    torch.testing.assert_close(logits[real], expected.logits[real], atol=5e-3, rtol=5e-3)
    generated = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert generated.shape == (2, inputs["input_ids"].shape[1] + 4)


def test_generate_and_train_in_bfloat16():
    model, inputs = lively_model().cuda().bfloat16(), to_cuda(video_inputs((4, 2)))
    assert model.generate(**inputs, max_new_tokens=4, cache_implementation="static").shape[1] == 341 + 4
    model.train().gradient_checkpointing_enable()
    model(**inputs, labels=labels_of(inputs)).loss.backward()
    gradient = model.model.vision_tower.scorer.mlp.fc1.weight.grad
    assert torch.isfinite(gradient).all() and gradient.any()


def test_blocks_on_the_cpu_and_on_the_gpu(tmp_path):
    model, inputs = lively_model(), video_inputs((4,))
    model.save_pretrained(tmp_path)
    names = dict(model.named_modules())
    device_map = {
        name: "cpu" if name.endswith(("layers.2", "layers.6", "scorer")) else 0
        for name in names
        if name in ("lm_head", "model.language_model", "model.multi_modal_projector", "model.vision_tower.scorer")
        or name.startswith("model.vision_tower.layers.")
        and name.count(".") == 3
        or name == "model.vision_tower.patch_embedding"
    }
    device_map["model.vision_tower.positional_embedding"] = 0
    split = type(model).from_pretrained(tmp_path, device_map=device_map)
    with torch.no_grad():
        expected = model(**inputs).logits
        torch.testing.assert_close(split(**to_cuda(inputs)).logits.cpu(), expected, atol=1e-2, rtol=1e-2)


def test_no_waiting_for_the_device_in_the_vision_part(real_vit):
    video = real_video(8)
    with torch.no_grad():
        real_vit.get_video_features(**video)
        torch.cuda.set_sync_debug_mode("error")
        try:
            real_vit.get_video_features(**video)
            real_vit.get_video_features(**video, prune_ratio=0.8)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_frames_are_resized_on_the_device_that_is_asked_for():
    video = torch.randint(0, 256, (9, 720, 1280, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    processor = Molmo2SttsVideoProcessor()
    on_cpu, on_gpu = (
        processor(video, do_sample_frames=False, return_tensors="pt", device=device) for device in ("cpu", "cuda")
    )
    assert on_gpu["pixel_values_videos"].device.type == "cuda"
    # A processor of its own does not rescale; half a level may be rounded either way.
    difference = (on_gpu["pixel_values_videos"].cpu().int() - on_cpu["pixel_values_videos"].int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-3
    assert torch.equal(on_gpu["video_token_pooling"].cpu(), on_cpu["video_token_pooling"])


# --- the language model ---


def two_pass_model():
    """A lively tiny model with heads that the fast kernels take, in bfloat16, and one with the dense mask."""
    config = tiny_config()
    config.text_config.head_dim = 64
    ours = enliven(type(tiny_model())(config).eval()).cuda().bfloat16()
    dense = copy.deepcopy(ours)
    ours.set_attn_implementation({"text_config": modeling.TWO_PASS})
    return ours, dense


@pytest.fixture
def layouts(monkeypatch):
    """Lets short prompts be attended to in two passes. Returns the layouts that are made."""
    made, lay_out = [], modeling.lay_out_tokens
    monkeypatch.setattr(modeling, "MIN_TWO_PASS_LENGTH", 2)
    monkeypatch.setattr(modeling, "lay_out_tokens", lambda *args: made.append(lay_out(*args)) or made[-1])
    return made


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("prune_ratio", [0.0, 0.6])
def test_two_passes_are_as_near_to_float32_as_the_dense_mask(layouts, side, prune_ratio):
    ours, dense = two_pass_model()
    inputs, logits = to_cuda(video_inputs((6, 2), side)), []
    # Random scores are the same in both precisions, so both keep the same windows.
    for model in (ours, dense, copy.deepcopy(dense).float()):
        model.config.stts_config.method = "random"
        with torch.no_grad():
            outputs = model(**inputs, prune_ratio=prune_ratio)
        kept = outputs.kept_token_idx
        real = inputs["attention_mask"] == 1 if kept is None else kept >= 0
        logits.append(outputs.logits[real])
    assert len(layouts) == 1
    errors = [relative_error(mine, logits[2]) for mine in logits[:2]]
    assert errors[0] < 1.5 * errors[1] + 1e-3


def test_training_in_two_passes_under_autocast(layouts):
    ours, dense = (model.float().train() for model in two_pass_model())
    inputs, gradients = to_cuda(video_inputs((6, 2), "right")), []
    for model in (ours, dense):
        model.config.stts_config.method = "random"
        model.gradient_checkpointing_enable()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(**inputs, labels=labels_of(inputs)).loss
        loss.backward()
        gradients.append([p.grad for p in model.model.language_model.parameters()])
    assert len(layouts) == 1
    for mine, other in zip(*gradients):
        assert relative_error(mine, other) < 5e-2


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_after_two_passes_agrees_with_single_prompts(layouts, cache):
    ours, _ = two_pass_model()
    inputs = to_cuda(video_inputs((4, 2)))
    kwargs = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": cache, "prune_ratio": 0.5}
    together = ours.generate(**inputs, **kwargs)
    assert len(layouts) == 1 and together.shape == (2, inputs["input_ids"].shape[1] + 4)
    # Near ties may fall either way in bfloat16; the first token is decided by the prefill alone.
    first = ours.generate(**inputs, **(kwargs | {"max_new_tokens": 1}))
    assert torch.equal(together[:, :-3], first)


def test_memory_of_a_prefill_grows_with_its_length_only():
    config = tiny_config()
    config.text_config.head_dim = 64
    model = type(tiny_model())(config).eval().cuda().bfloat16()
    model.set_attn_implementation({"text_config": modeling.TWO_PASS})
    peaks = []
    for length in (20_000, 40_000):
        ids = torch.full((1, length), 30, device="cuda")
        ids[:, 100:-100] = config.image_patch_id
        features = {"video": modeling.Molmo2SttsVideoFeatures(pooler_output=(torch.zeros(length - 200, 32).cuda(),))}
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.no_grad():
            features["video"].pooler_output = tuple(part.bfloat16() for part in features["video"].pooler_output)
            positions = torch.arange(length, device="cuda")[None]
            types = (ids == config.image_patch_id).long()
            model(
                ids,
                mm_token_type_ids=types,
                position_ids=positions,
                attention_mask=torch.ones_like(ids),
                mm_encoder_outputs=features,
                logits_to_keep=1,
            )
        peaks.append(torch.cuda.max_memory_allocated() - before)
    # A mask of 40,000 x 40,000 alone would take 1.6 GB.
    assert peaks[1] < 2.1 * peaks[0] < 1e9


def test_a_compiled_language_model_agrees(layouts):
    ours, _ = two_pass_model()
    inputs = to_cuda(video_inputs((6,)))
    with torch.no_grad():
        expected = ours(**inputs).logits
        ours.model.language_model.compile(fullgraph=True)
        assert relative_error(ours(**inputs).logits, expected) < 2e-2


def test_norms_in_one_kernel_are_near_float32():
    norm = modeling.Molmo2SttsRMSNorm(128).cuda().bfloat16()
    hidden_states = torch.randn(64, 32, 128, device="cuda", dtype=torch.bfloat16)
    expected = super(type(norm), copy.deepcopy(norm).float()).forward(hidden_states.float())
    assert relative_error(norm(hidden_states), expected) < 5e-3
