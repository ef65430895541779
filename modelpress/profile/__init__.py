"""Profile a model: which resource binds on this machine. `modelpress.profile.run` does it all."""
