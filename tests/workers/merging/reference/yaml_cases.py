"""Configurations that mergekit ran (`make_yaml`) and that we import (tests/workers/test_rebuild.py)."""

from __future__ import annotations

CASES = {
    "linear": """
merge_method: linear
models:
  - {model: a, parameters: {weight: 0.7}}
  - {model: b, parameters: {weight: 0.2}}
  - {model: c, parameters: {weight: 0.4}}
""",
    "linear_gradient_sum": """
merge_method: linear
base_model: base
models:
  - {model: base, parameters: {weight: [1.0, 0.0, 0.5]}}
  - {model: a, parameters: {weight: 0.25}}
  - {model: b, parameters: {weight: [0.0, 0.9]}}
parameters: {normalize: false}
""",
    "linear_base_left_out": """
merge_method: linear
base_model: base
models:
  - {model: a, parameters: {weight: 0.5}}
  - {model: b}
parameters: {weight: 0.25}
""",
    "slerp_documented": """
merge_method: slerp
base_model: a
slices:
  - sources:
      - {model: a, layer_range: [0, 4]}
      - {model: b, layer_range: [0, 4]}
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - value: 0.5
""",
    "task_arithmetic": """
merge_method: task_arithmetic
base_model: base
models:
  - {model: a, parameters: {weight: [0.2, 0.8]}}
  - model: b
    parameters:
      weight:
        - {filter: mlp.down_proj, value: 0.9}
        - {filter: layers.2., value: -0.3}
        - {filter: embed, value: [0.1, 0.9]}
  - {model: c, parameters: {weight: "1e-1"}}
parameters: {weight: 0.4, lambda: 0.5, normalize: true}
""",
    "ties": """
merge_method: ties
base_model: base
models:
  - {model: base}
  - {model: a, parameters: {weight: 0.5, density: 0.6}}
  - {model: b, parameters: {weight: 0.3, density: [0.2, 0.9]}}
parameters: {normalize: true, int8_mask: true, lambda: 1.1}
""",
    "ties_sum": """
merge_method: ties
base_model: base
models:
  - {model: a, parameters: {weight: 1}}
  - {model: b, parameters: {weight: 1}}
  - {model: c, parameters: {weight: 1}}
parameters: {normalize: false, density: 0.5, lambda: 0.4}
""",
    "breadcrumbs": """
merge_method: breadcrumbs
base_model: base
models:
  - {model: a, parameters: {weight: 0.5, density: 0.6, gamma: 0.1}}
  - {model: b, parameters: {weight: 0.3, gamma: 0.2}}
parameters: {density: 0.7}
""",
    "breadcrumbs_ties": """
merge_method: breadcrumbs_ties
base_model: base
models:
  - {model: a, parameters: {weight: 0.5}}
  - {model: b, parameters: {weight: 0.3}}
parameters: {density: 0.6, gamma: 0.2, lambda: 0.8}
""",
    "nuslerp_row_wise": """
merge_method: nuslerp
models:
  - {model: a, parameters: {weight: [0.2, 0.6]}}
  - {model: b, parameters: {weight: 0.4}}
parameters: {nuslerp_flatten: false, nuslerp_row_wise: true}
""",
    "nuslerp_base": """
merge_method: nuslerp
base_model: base
models:
  - {model: a, parameters: {weight: 0.3}}
  - {model: b, parameters: {weight: 0.6}}
""",
    "multislerp": """
merge_method: multislerp
base_model: base
models:
  - {model: a, parameters: {weight: 0.3}}
  - {model: b, parameters: {weight: [0.6, 0.1]}}
  - {model: c, parameters: {weight: 0.5}}
""",
    "karcher": """
merge_method: karcher
models: [{model: a}, {model: b}, {model: c}]
parameters: {max_iter: 20, tol: 1e-7}
""",
    "model_stock": """
merge_method: model_stock
base_model: base
models: [{model: a}, {model: b}, {model: c}]
""",
    "sce": """
merge_method: sce
base_model: base
models: [{model: a}, {model: b}, {model: c}]
parameters: {select_topk: 0.6}
""",
    "arcee_fusion": """
merge_method: arcee_fusion
base_model: base
models: [{model: a}]
""",
    "nearswap": """
merge_method: nearswap
base_model: base
models: [{model: a}]
parameters: {t: [0.01, 0.1]}
""",
    "passthrough": """
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 3]}]
  - sources:
      - model: b
        layer_range: [1, 4]
        parameters:
          scale:
            - {filter: o_proj, value: 0.5}
            - {filter: down_proj, value: [0.0, 0.5]}
            - value: 1.0
""",
    "stacked_linear": """
merge_method: linear
base_model: base
slices:
  - sources:
      - {model: base, layer_range: [0, 2], parameters: {weight: 0.25}}
      - {model: a, layer_range: [1, 3], parameters: {weight: [0.5, 1.0]}}
  - sources:
      - {model: b, layer_range: [2, 4], parameters: {weight: 1}}
      - {model: c, layer_range: [2, 4], parameters: {weight: [{filter: layers.3., value: 3}, {value: 1}]}}
""",
    "removed_layer": """
merge_method: task_arithmetic
base_model: base
slices:
  - sources:
      - {model: base, layer_range: [0, 2]}
      - {model: a, layer_range: [0, 2]}
  - sources:
      - {model: base, layer_range: [3, 4]}
      - {model: a, layer_range: [3, 4]}
parameters: {weight: [0.3, 0.6]}
""",
    "one_module": """
merge_method: linear
modules:
  default:
    models:
      - {model: a, parameters: {weight: 2}}
      - {model: b}
    parameters: {weight: 1}
""",
}
"""By name; the models are called base, a, b and c."""
