"""Rewrite golden.json after a deliberate change of a law: ``python -m tests.programs.regenerate_golden``."""

from __future__ import annotations

import json

if __name__ == "__main__":
    from tests.programs import test_families

    hashes = {example: test_families.sha(example) for example in test_families.EXAMPLES}
    test_families.GOLDEN_FILE.write_text(json.dumps(hashes, indent=1) + "\n")
