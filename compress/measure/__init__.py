"""Numbers of an artifact: size, parameters, MACs, latency, energy, memory."""

from compress.measure.latency import Bench, Latency, Timing, bench
from compress.measure.macs import (
    complete_shapes,
    count_module,
    count_onnx,
    node_macs,
    onnx_params,
    size_mib,
    zero_weights_pct,
)
from compress.measure.memory import memory

__all__ = [
    "METHODS",
    "Bench",
    "Latency",
    "Timing",
    "bench",
    "complete_shapes",
    "count_module",
    "count_onnx",
    "memory",
    "methods_of",
    "node_macs",
    "onnx_params",
    "size_mib",
    "zero_weights_pct",
]

METHODS = {  # how each quantity is measured and what it does not mean
    "latency_ms": "time of one call on the host, from arrays to arrays, copies to and from a "
    "device included; percentiles over all timed calls of interleaved rounds after a warm-up. One "
    "caller, not a loaded server; a row is marked busy where other processes took more than 10 % "
    "of the processors meanwhile, or the host gave more than 2 % of their time away",
    "latency_ms_ci95": "bootstrap over whole rounds, because calls within a round depend on each "
    "other",
    "device_latency_ms": "two events of the GPU around one execution, copies left out; what the "
    "network takes on the device when its input is there already",
    "throughput_ips": "batch size over the mean latency of one caller; not the most a machine can "
    "do with several callers",
    "speedup": "median latency of the original over that of the variant, timed side by side in the "
    "same rounds; the interval is a bootstrap over pairs of rounds. Within 2 % of 1 it is called "
    "no difference, within 10 % on a busy machine",
    "energy_mj_per_image": "what the counter of the whole chip (RAPL) or GPU (NVML) rose by during "
    "the timed calls, idle power included, over the images",
    "params": "elements of all parameters, shared ones once; in an ONNX file, of all constants but "
    "scales, zero points and shape arithmetic",
    "macs": "multiply-accumulates of convolutions and matrix products for one image, padding "
    "included; biases, normalization, activations and pooling are not counted. Work, not time",
    "file_mib": "bytes on disk, external data included",
    "weights_mib": "constants of the ONNX graph as stored; what a runtime repacks is in the peak. "
    "For an engine, what the engine says of itself",
    "activations_mib": "largest sum of tensors alive at one time, in the order of the ONNX graph; "
    "a runtime that fuses or works in place needs less. For an engine, the scratch memory it asks "
    "for",
    "peak_rss_mib": "largest resident memory of a fresh Python process that imports "
    "the runtime, loads the artifact and runs it",
    "peak_memory_mib": "that of the process less what the same process held after it had imported "
    "the runtime and run a network of one layer: what the artifact itself costs",
    "peak_device_mib": "GPU memory that was taken, by any process, between before the artifact "
    "was loaded and after it had run",
    "load_ms": "from the path to a session, once, files cached by the operating system or not",
    "first_call_ms": "the first call after loading",
    "top1_pct": "images whose largest logit is the label; the interval is Wilson's and tells how "
    "far another sample of as many images might differ",
    "top1_change_pct": "top-1 less that of the original on the same images; interval is a paired "
    "score interval (Tango), p-value by McNemar's mid-p test. Not significant means that so few "
    "images cannot tell, not that there is no change",
    "agreement_pct": "images with the same answer as the original, right or wrong",
    "flip_pct": "images the original has right and this has wrong",
    "worst_class_drop_pct": "largest loss of recall of any class. The worst of many classes is the "
    "unluckiest as well",
    "ece_pct": "expected calibration error: distance between confidence and accuracy over 15 equal "
    "bins of confidence, weighted by images",
    "sqnr_db": "signal-to-noise ratio of the logits against the original's: 20 dB is an error of a "
    "tenth, 40 dB of a hundredth",
}
OF_CLASSES = ("top1", "flip", "worst_class", "ece")  # what only one class an image has


def methods_of(*, tells_classes: bool) -> dict[str, str]:
    """Return how each quantity of a report is measured, for one class an image or another task."""
    if tells_classes:
        return dict(METHODS)
    return {key: text for key, text in METHODS.items() if not key.startswith(OF_CLASSES)} | {
        "metrics": "those of the task; intervals are of 1,000 bootstrap draws of the test images",
        "changes": "a metric less that of the original, both over the same draws of images",
        "agreement_pct": "how alike the predictions are to the original's, as the task compares "
        "them, right or wrong: a mean over images",
        "sqnr_db": METHODS["sqnr_db"].replace("the logits", "the worst output"),
    }
