"""Reports: renderables made from a profile, a plan or a run. Nothing here imports torch or prints."""
