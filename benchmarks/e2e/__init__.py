"""The main job: a real video through the complete model, timed by stage, told in a report."""
