"""Planning: from a cost graph to a plan with its proof. Nothing here imports torch.

planner.py is ``sw.plan`` and plan.py the record that it gives. On the way the cost graph becomes a problem
(formulation; what is asked and by which formulas stands in problem.py). partition.py splits it into stages: exactly
where its closed sets can be gone through (exact), else with the best split and bound in the time there is (wide).
pricing.py has the steps of splits simulated (schedules) and options.py weighs numbers of micro-batches, replicas and
schedules. Plans that are no chain of stages are in free; what is said beside a plan, in verdict.
"""
