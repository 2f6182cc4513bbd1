"""Statistics in the loggers that docs/logging.md names, read back from what those wrote."""

import time
from pathlib import Path

import pytest
import workload

import dist_agc


def statistics(*, per_parameter: bool) -> dict[str, float]:
    net = workload.model()
    net(*workload.my_share())["loss"].backward()
    stats = dist_agc.apply_agc(net, clipping_threshold=workload.THRESHOLD)
    assert stats is not None and 0 < int(stats.clipped_units) < stats.units
    return stats.as_dict(per_parameter=per_parameter)


@pytest.mark.filterwarnings("default")
def test_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="needs pip install wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    values = statistics(per_parameter=True)
    run = wandb.init(mode="offline", dir=tmp_path, project="agc")
    run.log(values, step=7)
    run.finish()
    (file,) = tmp_path.rglob("run-*.wandb")  # what `wandb sync` would send
    wanted = {name: str(int(value)) if value == int(value) else str(value) for name, value in values.items()}
    # Seen once in 35 runs, on a busy machine: finish() returns before wandb's service has written more than a header.
    began = time.monotonic()
    while missing := _missing(wanted, file.read_bytes()):
        assert time.monotonic() < began + 60, missing
        time.sleep(0.1)


def _missing(wanted: dict[str, str], written: bytes) -> list[str]:
    return [name for name, number in wanted.items() if name.encode() not in written or number.encode() not in written]


@pytest.mark.filterwarnings("default")
def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="needs pip install mlflow-skinny")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    values = statistics(per_parameter=False)  # its file store takes a/b for a folder where there is a/b/c
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    with mlflow.start_run() as run:
        mlflow.log_metrics(values, step=7)
    client = mlflow.MlflowClient()
    for name, value in values.items():
        (point,) = client.get_metric_history(run.info.run_id, name)
        assert (point.step, point.value) == (7, value)
