"""Print one measured model's layers as a CSV table.

    python3 table.py measured/NAME.json > NAME.csv
"""
import csv
import json
import sys


def row(number, layer):
    flat = {"layer": number} | {k: v for k, v in layer.items() if not isinstance(v, dict)}
    flat |= {f"hot_{k}": v for k, v in layer.get("coverage", {}).items()}
    flat |= {f"wiki_hot_{k}": v for k, v in layer.get("coverage_of_wiki_by_its_own_order", {}).items()}
    flat |= {f"wiki_hot_novels_order_{k}": v for k, v in layer.get("coverage_of_wiki_by_the_novels_order", {}).items()}
    flat |= {f"reuse_{k}": v["caught"] for k, v in layer.get("reuse", {}).items()}
    flat |= {f"union_{k}": v["union"] for k, v in layer.get("reuse", {}).items()}
    flat |= {f"read16_{k}": v for k, v in layer.get("groups_of_16_read_per_active", {}).items()}
    if "pairs" in layer:
        flat["joint_lift"] = layer["pairs"]["mean_lift_of_joint_firings"]
    flat |= {f"under_{k}_of_mean": v for k, v in layer.get("under_share_of_mean", {}).items()}
    flat |= {f"neurons_for_{k}_energy": v for k, v in layer.get("neurons_for_energy", {}).items()}
    return flat


if __name__ == "__main__":
    rows = [row(n, layer) for n, layer in enumerate(json.load(open(sys.argv[1]))["layers"])]
    table = csv.DictWriter(sys.stdout, rows[0], lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
