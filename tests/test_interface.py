"""The Python interface, in the order a user meets it, on a torchvision network."""

import inspect

import numpy as np
import torch

import compress


def test_a_network_goes_from_torchvision_to_an_int8_session(tmp_path):
    torch.manual_seed(0)
    example = torch.randn(1, 3, 32, 32)
    model = compress.load_model("torchvision:squeezenet1_1", weights=None, num_classes=10)
    before = {key: value.clone() for key, value in model.state_dict().items()}

    plan = compress.plan_pruning(model, example, criterion="l1", keep_macs=0.5)
    small = compress.apply_pruning(model, plan)
    masked = compress.mask_pruning(model, plan)
    torch.testing.assert_close(small(example), masked(example), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    plan.save(tmp_path / "plan.json")
    again = compress.PrunePlan.load(tmp_path / "plan.json")
    torch.testing.assert_close(compress.apply_pruning(model, again)(example), small(example))

    reference = "torchvision:squeezenet1_1"
    compress.save_model(small, tmp_path / "small", plan=plan, reference=reference)
    reloaded = compress.load_model(tmp_path / "small")
    torch.testing.assert_close(reloaded(example), small(example))

    onnx_path, int8_path = tmp_path / "small.onnx", tmp_path / "int8.onnx"
    compress.export_onnx(small, example, onnx_path)
    batches = [torch.randn(8, 3, 32, 32).numpy() for _ in range(2)]
    quant = compress.quantize_onnx(
        onnx_path, batches, int8_path, target="onnxruntime", method="auto", observer=None
    )
    assert isinstance(quant, compress.QuantPlan)
    findings = compress.lint_onnx(int8_path, target="tensorrt")
    assert {"rule", "node", "message", "fixable"} <= set(dir(findings[0]))

    compress.build_engine(
        onnx_path, tmp_path / "engine.onnx", runtime="onnxruntime", batch=(1, 1, 8)
    )
    with compress.open_session(int8_path, runtime="onnxruntime", threads=2) as session:
        (logits,) = session.run(batches[0])
    with compress.open_session(onnx_path) as session:
        (exact,) = session.run(batches[0])
    noise = np.mean((logits - exact) ** 2)
    assert 10 * np.log10(np.mean(exact**2) / noise) > 15


def test_the_signatures_that_outside_scripts_call():
    names = {
        "load_model": {"weights", "num_classes"},
        "plan_pruning": {"criterion", "keep_macs", "keep_params", "latency_ms", "batches"},
        "save_model": {"plan", "reference"},
        "quantize_onnx": {"target", "method", "observer"},
        "lint_onnx": {"target"},
        "build_engine": {"runtime", "batch"},
        "open_session": {"runtime", "threads"},
        "run": {"out"},
    }
    for name, wanted in names.items():
        assert wanted <= set(inspect.signature(getattr(compress, name)).parameters), name
