"""`ray job submit --working-dir`: what a job would write into Ray's copy is refused."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from patience import scaled

ROOT = Path(__file__).resolve().parents[2]

# Its node's agent, which takes jobs, gets a free port: the usual one is taken by the Ray that other
# tests share, and without it the dashboard would wait for the agent for ever.
SUBMIT = """
import sys, time
import ray
from ray.cluster_utils import Cluster
from ray.job_submission import JobSubmissionClient

head = {"num_cpus": 2, "num_gpus": 0, "include_dashboard": True, "dashboard_agent_listen_port": 0}
cluster = Cluster(initialize_head=True, head_node_args=head)
client = JobSubmissionClient(f"http://{ray.init(address=cluster.address).dashboard_url}")
while True:
    try:
        job = client.submit_job(
            entrypoint=f"{sys.executable} jobs/train.py shapes",
            runtime_env={"working_dir": sys.argv[1]},
        )
        break
    except RuntimeError as error:  # the dashboard is there before the agent
        if "No available agent" not in str(error):
            raise
        time.sleep(0.5)
while not client.get_job_status(job).is_terminal():
    time.sleep(0.5)
print(client.get_job_logs(job))
print("ended", client.get_job_status(job).value)
ray.shutdown()
cluster.shutdown()
"""


def test_a_submitted_job_refuses_the_default_storage_in_rays_copy(tmp_path):
    for folder in ("jobs", "caption_ray"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment.pop("CAPTION_RAY_STORAGE", None)
    done = subprocess.run(
        [sys.executable, "-c", SUBMIT, str(tmp_path)],
        capture_output=True, text=True, env=environment, cwd=tmp_path.parent, timeout=scaled(200),
    )  # fmt: skip
    assert "ended FAILED" in done.stdout, done.stdout + done.stderr
    (line,) = (line for line in done.stdout.splitlines() if "error: " in line)
    assert "--run.storage is './runs': `ray job submit` runs the job in a copy" in line
    assert "Traceback" not in done.stdout
