#!/usr/bin/env bash
# A run on the nodes of a Slurm job: Ray is started on them with a token of the job's own, and ends with the run.
#
#     sbatch --nodes=2 --gpus-per-node=8 cluster/deploy/slurm.sh configs/mine.yaml --set run.dir=/shared/runs
#
# From the checkout's root, on a file system that all nodes share, with its .venv. After a preemption, a lost node or the
# end of the time limit the same command carries on; after the first two Slurm gives it again by itself.
#SBATCH --job-name=prefloop
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
set -euo pipefail

[ $# -ge 1 ] || { echo "usage: sbatch [options] $0 CONFIG [--set KEY=VALUE ...]" >&2; exit 2; }
cd "${SLURM_SUBMIT_DIR:?to be started with sbatch}"
export PATH="$PWD/.venv/bin:$PATH" RAY_USAGE_STATS_ENABLED=0
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK" # which srun no longer takes from sbatch since Slurm 22.05
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN # srun hands the environment on; it stands in no file

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
address=$head:$((20000 + SLURM_JOB_ID % 10000)) # two jobs may meet on one node
log=slurm-$SLURM_JOB_ID-ray.log
node=(ray start --num-cpus="$SLURM_CPUS_PER_TASK" --disable-usage-stats --block)

srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" "${node[@]}" --head --port="${address#*:}" \
  --temp-dir="/tmp/ray-$SLURM_JOB_ID" --include-dashboard=false >"$log" 2>&1 &
for _ in {1..60}; do
  ray status --address "$address" >/dev/null 2>&1 && break
  sleep 2
done
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
  others=$((SLURM_JOB_NUM_NODES - 1))
  srun --overlap --nodes="$others" --ntasks="$others" --exclude="$head" "${node[@]}" --address="$address" >>"$log" 2>&1 &
fi
python - "$address" "$SLURM_JOB_NUM_NODES" <<'END' || { echo "Ray did not come up; see $log" >&2; exit 1; }
import sys, time
import ray

address, wanted = sys.argv[1], int(sys.argv[2])
ray.init(address, log_to_driver=False, logging_level="ERROR")
deadline = time.monotonic() + 300
while sum(node["Alive"] for node in ray.nodes()) < wanted:
    if time.monotonic() > deadline:
        sys.exit(1)
    time.sleep(1)
END

# In the shell's place, so that Slurm's TERM, two minutes before the time limit, ends the run with a checkpoint.
exec prefloop run "$@" --set cluster.address="$address"
