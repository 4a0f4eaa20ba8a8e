"""The vocabularies: every word that a setting may have, without NumPy, so that `--help` is quick."""

from typing import Final, Literal, get_args

Solver = Literal["ddpm", "ddim", "dpmpp-2m", "sde-dpmpp-2m"]
# What may be asked for: "fast" stands for the solver, spacing and steps of `spec.FAST`.
AskedSolver = Literal[Solver, "fast"]
Spacing = Literal[
    "leading",
    "trailing",
    "linspace",
    "openai",
    "openai-ddim",
    "quad",
    "lucidrains",
    "dpm-linspace",
    "dpm-leading",
    "log-snr",
]
Prediction = Literal["epsilon", "v", "x0", "mean"]
Variance = Literal["fixed_small", "fixed_large", "learned_range"]
Schedule = Literal["linear", "cosine", "sigmoid", "scaled_linear", "sigmoid_alpha"]
Loss = Literal["simple", "vlb", "hybrid"]
Preset = Literal["digits", "mnist", "small", "cifar10", "256"]
Weights = Literal["ema", "raw"]  # of a checkpoint: averaged, or as trained
GraphPrecision = Literal["fp32", "bf16", "fp16"]  # of an ONNX graph, in its types
# tf32: a float32 graph, whose engine may round what it multiplies.
Precision = Literal["fp32", "tf32", "bf16", "fp16"]
# What a backend may be asked to compute in when it loads a float32 model.
RunPrecision = Literal["fp32", "bf16"]
Flavour = Literal["tensorrt", "tensorrt-rtx"]
Backend = Literal["onnxruntime", "openvino", "ncnn", "tensorrt", "torch"]
# How an image becomes x_t: with noise of the forward process, or by DDIM run the other way.
Encoder = Literal["noise", "ddim"]
# How much of a model's proof a server checks before it is ready.
Proof = Literal["whole", "predictions", "off"]

SOLVERS: Final = get_args(Solver)
ASKED_SOLVERS: Final = get_args(AskedSolver)
SPACINGS: Final = get_args(Spacing)
PREDICTIONS: Final = get_args(Prediction)
VARIANCES: Final = get_args(Variance)
SCHEDULES: Final = get_args(Schedule)
LOSSES: Final = get_args(Loss)
PRESETS: Final = get_args(Preset)
WEIGHTS: Final = get_args(Weights)
PRECISIONS: Final = get_args(Precision)
RUN_PRECISIONS: Final = get_args(RunPrecision)
BACKENDS: Final = get_args(Backend)
ENCODERS: Final = get_args(Encoder)
PROOFS: Final = get_args(Proof)
# What TensorRT-RTX builds for without a GPU of the kind: not 7.5, which lacks float32 matrix products, and it has no
# target for 9.0 and 10.0, which TensorRT is for.
CAPABILITIES: Final = ("8.0", "8.6", "8.9", "12.0", "12.1")
MAX_BATCH: Final = 65_535  # rows of one batch: what a grid of CUDA's takes
