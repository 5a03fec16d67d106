"""Profiler: a model becomes a profile (time and memory of every unit on every device) and a cost graph.

collect.py is ``sw.profile``, profile.py the record that it gives and graph.py the cost graph of that. target.py finds
the model, units.py what of it is placed whole, and trace.py how it calls these (recording). campaign.py knows what has
to be measured and what is known (cache.py, recall.py), measure.py and memory.py measure a step (measuring), each device
in a process of its own (workers), and links.py times what is between them. Devices that are not here are in estimates;
profiles and graphs as others write and read them, in formats.
"""
