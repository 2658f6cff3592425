"""The closed sets of words that settings, files and records use."""

from typing import Literal

Split = Literal["train", "val", "test"]
Metric = Literal["accuracy", "mse"]
BatchNorm = Literal["transductive", "running", "support"]
# What results say of batch norm: the setting, or that the network has none.
BatchNormMode = Literal[BatchNorm, "none"]
# The single best checkpoint of a run (the last before any validation), or the ensemble of its best ones.
Model = Literal["best", "ensemble"]
Rotations = Literal["augment", "classes", "none"]
Augment = Literal["flips", "crops", "flips+crops", "none"]
Normalize = Literal["none", "imagenet"]
Activation = Literal["leaky_relu", "relu"]
Pooling = Literal["max", "stride"]
Readout = Literal["flatten", "mean"]
InnerOptimizer = Literal["sgd", "adam"]
Adapts = Literal["all", "head", "body"]
NetName = Literal["conv4", "mlp", "resnet12"]
Precision = Literal["auto", "float32", "tf32", "bf16", "float64"]
EngineName = Literal["adjoint", "plain"]
# What distinguishes a task's classes: the learnt head, a new one of zeros, class means, or every example.
Classifier = Literal["head", "zeros", "prototypes", "neighbours"]
# What keeps an improvement of MAML++ from having a meaning with an algorithm or a data set.
Obstacle = Literal[
    "no unrolled loop", "one pass of the body", "own inner rates", "own meta learning rate", "no batch norm"
]
# Why a training ended before its last meta-step; "" if it did not.
StopReason = Literal["", "time limit", "SIGINT", "SIGTERM"]
# What status.json says of a run.
RunStatus = Literal["running", "finished", "interrupted", "diverged", "failed"]
# What a table says of a run: as above, or that there is no run folder yet.
CellStatus = Literal[RunStatus, "missing"]
# What a row of metrics.jsonl has: the fields of a TrainReport, or those of a ValidationDone.
RowKind = Literal["report", "validation"]
# What the display of a grid says of a cell.
CellProgress = Literal["waiting", "elsewhere", "training", "testing", "done", "diverged", "failed"]
# Where the cells of a grid run.
ExecutorName = Literal["local", "ray"]
