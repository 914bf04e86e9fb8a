# What is special about your site, in one place. All of slurm/*.sh, launch/job.sh and
# launch/submit_chain read this file (slurm/table1.sh only PYTHON and what sbatch reads).
# TPP_SITE=FILE names another one, and a variable that is set in the environment wins over it.
# Nothing here has to be set; where a variable has a default, that is the value shown.

# --- What sbatch is asked for -----------------------------------------------------------------
# sbatch itself reads these, before the job exists. So they count for `bash slurm/NAME.sh` and
# `launch/submit_chain`, which read this file first. For a plain `sbatch slurm/NAME.sh` put them in
# your shell's profile, or give the options.
#export SBATCH_PARTITION="${SBATCH_PARTITION-gpu}"
#export SBATCH_ACCOUNT="${SBATCH_ACCOUNT-myproject}"
#export SBATCH_QOS="${SBATCH_QOS-normal}"
#export SBATCH_TIMELIMIT="${SBATCH_TIMELIMIT-1-0}"

# The chain's stages, as options of sbatch: what trains, the removal of filters (one core, no GPU,
# no data), and evaluation. Options on the command line come on top of those for training.
#: "${TPP_TRAIN_OPTIONS=--nodes=1 --exclusive --mem=0}"
#: "${TPP_PRUNE_OPTIONS=--nodes=1 --ntasks=1 --cpus-per-task=1 --time=60}"
#: "${TPP_EVALUATE_OPTIONS=--nodes=1 --ntasks=1 --gpus-per-node=1 --cpus-per-task=4}"

# --- The software -----------------------------------------------------------------------------
# Modules to load, as on the command line of `module load`.
#: "${TPP_MODULES=cuda/12.8 python/3.12}"

# The interpreter. Default: .venv/bin/python in the repository, else python3; in a container python3.
#: "${PYTHON=/path/to/venv/bin/python}"

# A container image: a .sqsh file or a registry's name is for pyxis/enroot (srun
# --container-image), a .sif file for apptainer. TPP_CONTAINER_KIND=pyxis|apptainer says otherwise.
# The repository, the working directory and data.root are mounted; TPP_MOUNTS adds more,
# comma-separated: /scratch,/host/path:/path/inside. launch/container/ has what makes an image.
#: "${TPP_CONTAINER=/shared/images/tpp.sqsh}"
#: "${TPP_MOUNTS=/scratch}"

# --- The data ---------------------------------------------------------------------------------
# A folder or a .tar file (also .tar.gz, .tar.zst) that every node copies to its own disk, once,
# before training starts. data.root is then the copy; give no data.root of your own.
#: "${TPP_STAGE_DATA=/shared/imagenet.tar}"
# Where to. Default: SLURM_TMPDIR, else TMPDIR, else /tmp.
#: "${TPP_LOCAL_DISK=/local/scratch}"

# data.root is on the compute nodes only: it is not looked for where the job is submitted.
#: "${TPP_DATA_ON_NODES=1}"

# --- The ranks --------------------------------------------------------------------------------
# srun (one task per GPU), torchrun, accelerate or deepspeed. All end in the same run.
#: "${TPP_LAUNCHER=srun}"
# More options for the srun that starts the ranks, such as --mpi=none or --cpu-bind=none.
#: "${TPP_SRUN_OPTIONS=}"

# Where ranks of several nodes meet. Default: the first node, and a port from the job's id.
#export MASTER_ADDR MASTER_PORT

# The network, where NCCL does not find the right one by itself.
#export NCCL_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5

# --- Starting again ---------------------------------------------------------------------------
# A job that was stopped by a signal, or that has lost a rank or a node, is requeued this often.
#: "${TPP_MAX_RESTARTS=50}"
# But not if its ranks were killed, by no signal of SLURM's, within so many seconds of their start.
#: "${TPP_SETTLED_AFTER=60}"
