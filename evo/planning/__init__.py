"""What a search will take, told beforehand: `mergefront plan`.

footprint.py turns headers and config.json into bytes, sources.py those that are merged, merges.py what a merge takes
for a while, engines.py what an engine holds; times.py turns bytes into seconds; plan.py adds them up by place and finds
the setting that makes them fit; machine.py asks this machine; ranks.py is about several processes; calibrate.py loads
the model, trial.py extrapolates.
"""
