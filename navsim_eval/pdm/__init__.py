"""The planner that progress is measured against, and the world it and every other plan is judged in.

`route` → `drivable` → `observation` → `proposals` → `dynamics` → `reference` → `cache`: where to go, what the ground
is, what is in the way, which plans PDM-Closed considers, what the vehicle makes of them, which one it takes, and all of
it packed per scene. `types` holds what travels between them. Source: PDM-Closed (Dauner et al., "Parting with
misconceptions about learning-based vehicle motion planning", CoRL 2023) as NAVSIM v1.1 and v2.2 run it.
"""
