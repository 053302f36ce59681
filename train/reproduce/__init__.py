"""`sagsae reproduce`: tests which of the SA-GSAE paper's claims hold on a model (docs/records/reproduction.md).

    preset -> plan -> pilot -> run ─> curves -> analysis -> claims ─> render

`preset` holds the sizes, `plan` turns them into configurations, `cost` estimates time and disk, `pilot` is the rule
that tunes both methods, and `run` runs everything. `curves`, `analysis` and `claims` do arithmetic on the measurements.
`tables`, `figure` and `render` write the results.
"""
