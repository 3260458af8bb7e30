"""Jobs in virtual time: the production queue, scaling, order, budgets and placement under modelled engines.

Nothing here starts an engine or reads a prompt. `step_cost` says what one step of an engine costs, `calibration` holds
its frozen constants and how closely they meet published figures, `engine` runs requests on it step by step.
"""
