"""Messages say what, where, what was expected and what to do."""

import pytest

from compress import errors


def test_a_message_has_its_four_parts_in_order():
    error = errors.PlanError(
        "cannot keep 13 of 64 channels",
        where="layer1.0.conv1",
        expected="a multiple of 4",
        fix="Set round_to: 4",
    )
    assert str(error) == (
        "layer1.0.conv1: cannot keep 13 of 64 channels. Expected a multiple of 4. Set round_to: 4."
    )


def test_an_outer_place_is_put_before_the_inner_one():
    error = errors.PlanError("cannot be cut", where="conv1").within("stage 01-prune")
    assert str(error) == "stage 01-prune: conv1: cannot be cut."


def test_an_unknown_name_lists_the_known_and_guesses():
    error = errors.UnknownNameError("criterion", "talyor", ["taylor", "l1"])
    assert str(error) == "no such criterion 'talyor'. Did you mean 'taylor'? Known: l1, taylor."


@pytest.mark.parametrize("name", [n for n in vars(errors) if n.endswith("Error")])
def test_every_error_is_one_family_and_stands_in_the_drawn_tree(name):
    assert issubclass(getattr(errors, name), errors.CompressError)
    assert name in (errors.__doc__ or "")


@pytest.mark.parametrize("said", errors.OUT_OF_MEMORY)
def test_words_for_too_little_memory_count_but_in_errors_of_our_own(said):
    assert errors.is_out_of_memory(RuntimeError(f"kernel: {said} (1 GiB)"))
    assert errors.is_out_of_memory(MemoryError())
    assert not errors.is_out_of_memory(errors.EngineError(f"the process says: {said}"))
    assert not errors.is_out_of_memory(RuntimeError("shape mismatch"))


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        (
            "/src/onnx/version_converter/Base.h:66: look: Assertion `false` failed: No Shape",
            "No Shape",
        ),
        (
            "[ONNXRuntimeError] : 1 : FAIL : Exception during initialization: /src/rnn/lstm.h:53 "
            "onnxruntime::LSTM::LSTM(const onnxruntime::OpKernelInfo&) layout_ == 0 was false. No",
            "No",
        ),
        (
            "/src/a.cc:1 void onnxruntime::It::Append(int64_t, int64_t) a == 1 was false. 4 by 8",
            "4 by 8",
        ),
        (
            "Load failed:/src/a.cc:12 void onnxruntime::G::X(const std::vector<int>&) bad",
            "Load failed:bad",
        ),
        ("layer1.h is missing\nand more", "layer1.h is missing"),
    ],
)
def test_reasons_of_libraries_name_no_place_in_their_source(told, reason):
    assert errors.reason_of(told) == reason


@pytest.mark.parametrize(
    ("asked", "wanted", "said"),
    [
        ("phtos", "folder", "no such folder. Did you mean '{}/photos'?"),
        ("net.pyy", "file", "no such file. Did you mean '{}/net.py'?"),
        ("net.xml", "file", "no such file"),
        ("ent.onnx", "file", "no such file"),  # its ending is all that it shares
        ("nt.py", "folder", "no such folder"),
        ("photos", "file", "is a folder, not a file"),
        ("net.py", "folder", "is a file, not a folder"),
        ("absent/below", "file or folder", "no such file or folder"),
        ("a\0b", "file", "no such file"),
    ],
)
def test_what_is_absent_is_told_with_what_lies_there(tmp_path, asked, wanted, said):
    (tmp_path / "photos").mkdir()
    for name in ("net.py", "other.onnx"):
        (tmp_path / name).touch()
    assert errors.absence(tmp_path / asked, wanted) == said.format(tmp_path)
