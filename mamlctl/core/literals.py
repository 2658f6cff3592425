"""The closed sets of strings in settings, files and records."""

from collections.abc import Mapping
from typing import Literal, get_args

Split = Literal["train", "val", "test"]
SPLITS: tuple[str, ...] = get_args(Split)
Metric = Literal["accuracy", "mse", "return"]
HIGHER_IS_BETTER: tuple[Metric, ...] = ("accuracy", "return")
METRIC_NAMES: Mapping[Metric, str] = {
    "accuracy": "accuracy",
    "mse": "mean squared error",
    "return": "mean return",
}
TaskType = Literal["classification", "regression"]  # of the user's own tasks
BatchNorm = Literal["transductive", "running", "support"]
# Batch norm in results: the setting, or "none" if the network has no batch norm.
BatchNormMode = Literal[BatchNorm, "none"]
# The best checkpoint of a run (the last one before any validation), or the ensemble of the best ones.
Model = Literal["best", "ensemble"]
Models = Literal["best", "ensemble", "all"]  # which of them to test
ClassLevel = Literal["top", "leaf"]  # which folders of a folder of images are classes
Rotations = Literal["augment", "classes", "none"]
Augment = Literal["flips", "crops", "flips+crops", "none"]
Normalize = Literal["none", "imagenet"]
Activation = Literal["leaky_relu", "relu"]
Pooling = Literal["max", "stride"]
Readout = Literal["flatten", "mean"]
InnerOptimizer = Literal["sgd", "adam"]
OuterStep = Literal["trpo", "pg"]  # of policies
Adapts = Literal["all", "head", "body"]
# The networks of mamlctl, and torchvision's classifiers that pass the check of modules.
BUILT_IN_NETS = ("conv4", "mlp", "resnet12")
TORCHVISION_NETS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "efficientnet_b0",
    "mobilenet_v2",
    "regnet_y_400mf",
    "shufflenet_v2_x0_5",
)
# The built-in losses -> the metric of the data that they are for.
LOSSES: dict[str, Metric] = {"cross_entropy": "accuracy", "mse": "mse", "mae": "mse", "huber": "mse"}
DEFAULT_LOSSES: dict[Metric, str] = {"accuracy": "cross_entropy", "mse": "mse"}
Precision = Literal["auto", "float32", "tf32", "bf16", "float64"]
EngineName = Literal["adjoint", "compiled", "plain"]
ConvName = Literal["auto", "direct", "winograd"]
# What classifies a task's queries: the learnt head, a new head of zeros, class means, or single examples.
Classifier = Literal["head", "zeros", "prototypes", "neighbours"]
# Why an improvement of MAML++ has no meaning with an algorithm or a data set.
Obstacle = Literal[
    "no unrolled loop", "one pass of the body", "own inner rates", "own meta learning rate", "no batch norm"
]
# Why training ended before its last meta-step; "" if it did not.
StopReason = Literal["", "time limit", "SIGINT", "SIGTERM", "SIGHUP"]
# The status of a run in status.json.
RunStatus = Literal["running", "finished", "interrupted", "diverged", "failed"]
# The status of a run in a table: as above, or "missing" if there is no run folder yet.
CellStatus = Literal[RunStatus, "missing"]
# The status of a run in `compare --list`: as above, or "damaged" if its settings cannot be read.
ListedStatus = Literal[RunStatus, "damaged"]
# The kind of a row in metrics.jsonl: it has the fields of TrainReport or those of ValidationDone.
RowKind = Literal["report", "validation"]
# The state of a cell in the display of a grid.
CellProgress = Literal["waiting", "elsewhere", "training", "testing", "done", "diverged", "failed"]
# The programs for which `train --log` also writes.
LogName = Literal["tensorboard"]
# Where the cells of a grid run.
ExecutorName = Literal["local", "ray"]

# The filters that shrink images; the first is the default.
RESIZES = ("bilinear", "bicubic", "lanczos", "box", "nearest")
