"""Runtime: a plan and a model become a placed model or a pipeline run."""
