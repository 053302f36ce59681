"""`sagsae reproduce`: which of the SA-GSAE paper's claims hold on a model (docs/reproduction.md).

    preset -> plan -> pilot -> run ─> curves -> analysis -> claims ─> render

`preset` holds the sizes, `plan` turns them into configurations, `cost` says what they take, `pilot` is the rule by
which both methods are tuned, `run` does it all; `curves`, `analysis` and `claims` are arithmetic on what was measured;
`tables`, `figure` and `render` write it down.
"""
