"""Tasks for lm-eval that are scored with motkit's verifier: ``motkit_aime24``, ``motkit_aime25``.

`motkit.general.evaluate_tasks` knows them by name; lm-eval's own command finds them with
``lm_eval --include_path $(python -c "import motkit.tasks; print(motkit.tasks.__path__[0])") --tasks motkit_aime24 …``.
"""
