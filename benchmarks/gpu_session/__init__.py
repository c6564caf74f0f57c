"""The first nine minutes on a GPU, in order of value: scripts/gpu_session.sh and docs/gpu.md."""
