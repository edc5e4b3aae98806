"""Measures that BentoML does not take, in the registry that its `/metrics` gives out."""

from prometheus_client import Counter, Gauge, Histogram

STAGE_SECONDS = Histogram(
    "tokenfusion_stage_seconds",
    "Seconds that a stage of a request took",
    ["stage"],
    buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60),
)
BATCH_IMAGES = Histogram(
    "tokenfusion_batch_images", "Images of a batch", buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
)
REFUSED = Counter("tokenfusion_refused", "Requests that were refused", ["status", "kind"])
WAITING_IMAGES = Gauge(
    "tokenfusion_waiting_images", "Prepared images that wait for the model", multiprocess_mode="livesum"
)
UNREADABLE = Counter("tokenfusion_unreadable_images", "Images that could not be read")
LOADED = Counter("tokenfusion_loads", "How often a classifier was loaded", ["result"])
