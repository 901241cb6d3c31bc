"""Every public default, once; read by the signatures of commands/ and of cli/ alike. Imports nothing heavy."""

from __future__ import annotations

from typing import Literal

OnBad = Literal["fail", "skip"]
Device = Literal["auto", "cpu", "cuda", "mps"]
Engine = Literal["auto", "eager", "openvino", "compile"]
Compute = Literal["auto", "fp32", "bf16", "fp16"]
Decode = Literal["pillow", "fast", "draft"]
StorageDtype = Literal["auto", "float32", "float16"]
ClassWeight = Literal["none", "balanced"]
Optimizer = Literal["adamw", "lbfgs"]
Schedule = Literal["cosine", "constant"]
ExportFormat = Literal["torchvision", "safetensors", "onnx"]
BatchNorm = Literal["frozen", "train"]
FinetuneOptimizer = Literal["sgd", "adamw"]
Augment = Literal["crop", "trivial", "none"]

BACKBONE = "resnet18"
WEIGHTS = "DEFAULT"
DEVICE: Device = "auto"
ENGINE: Engine = "auto"  # on a CPU openvino where it is installed, else eager
COMPUTE: Compute = "auto"  # fp32 with TF32 off on every device: a cache made on one machine is read on all
DECODE: Decode = "pillow"  # whose pixels all others are held to
STORAGE_DTYPE: StorageDtype = "auto"  # float32 for pooled embeddings
BOUNDARY = "pooled"  # the input of the network's last linear layer
#: Of a stage's activations, which take a hundred times as much as embeddings: those of 100,000 images in two views at
#: the end of ResNet-18's layer3 in float16, or of 25,000 at the end of its layer1.
MAX_BYTES = "20GB"
VIEWS = 1  # where neither the user nor the cache says otherwise
MAX_VIEWS = 255  # a view's number is stored in one byte
CACHE_DIR = "./cache"
CACHE_DIR_VARIABLE = "TRANSFERCACHE_DIR"
MODELS_DIR = "./models"

# 32 images of 224 px keep two cores busy, waste little on a short last batch, and are soon decoded.
EXTRACT_BATCH_SIZE = 32
# A GPU wants more at once: on an H100 256 were 1.2 times as fast as 64, and 1,024 only 1.05 times as fast again.
CUDA_BATCH_SIZE = 256
VAL_FRACTION = 0.2
SPLIT_SEED = 0
ON_BAD: OnBad = "fail"
SEED = 0

SOLVER = "logistic"
C = "auto"
N_FOLDS = 5
CLASS_WEIGHT: ClassWeight = "none"
OPTIMIZER: Optimizer = "adamw"
KNN_NEIGHBOURS = 5

# The seed's rates, which are for batches of 4; scaled linearly with the batch (Goyal et al. 2017, section 2.1).
SEED_BATCH_SIZE = 4
SEED_LR_BACKBONE = 1e-4
SEED_LR_HEAD = 1e-3
# AdamW's, for batches of 32; scaled with the root of the batch (Malladi et al. 2022, section 5).
ADAMW_BATCH_SIZE = 32
ADAMW_LR_BACKBONE = 2e-4
ADAMW_LR_HEAD = 4e-3
ADAMW_WEIGHT_DECAY = 0.01  # torch's own
# A head that the cache has trained is spoilt by rates that a new one needs: all are this share of the backbone's.
PROBED_RATE_SHARE = 0.25
FINETUNE_BATCH_SIZE = 32
EPOCHS = 5
FINETUNE_OPTIMIZER: FinetuneOptimizer = "sgd"
MOMENTUM = 0.9
LR_DECAY = 1.0
SCHEDULE: Schedule = "cosine"
WARMUP = 0.0
LABEL_SMOOTHING = 0.0
MIXUP = 0.0
AUGMENT: Augment = "crop"
CROP_AREA = 0.5  # smaller crops of small sets lost: docs/decisions/0014-fine-tuning-defaults.md
EMA = "none"
BATCH_NORM: BatchNorm = "frozen"
UNFREEZE = "all"
SELECT = "none"
TRY_SHARE = 0.2  # of the training rows, held out to choose among what is tried
KEEP_CHECKPOINTS = 2

STRATEGIES = "knn,logistic,linear,finetune"
SEEDS = 1
REPEATS = 10  # draws of each size in --shots and --learning-curve
TOP = 5
EXPORT_FORMAT: ExportFormat = "torchvision"  # needs no extra
