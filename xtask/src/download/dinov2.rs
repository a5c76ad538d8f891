//! DINOv2-small out of an ONNX export: initialisers under their HF names.
//!
//! The exporter folded each linear layer's weight into an anonymous, transposed `onnx::MatMul_*`; the name of the bias
//! that is added to the product says which layer it was.

use std::collections::{BTreeMap, HashMap};
use std::{fs, path::Path};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::checkpoint::{Tensors, check_shape, write_json};
use super::onnx::Onnx;

const HIDDEN: usize = 384;
const LAYERS: usize = 12;
const PATCH: usize = 14;
const IMAGE: usize = 518;
const BACKBONE: &str = "backbone.";

/// Reads the ONNX file `onnx` and fills the folder `out`.
pub(crate) fn convert(onnx: &Path, out: &Path) -> Result<()> {
    let bytes = fs::read(onnx).with_context(|| format!("reading {}", onnx.display()))?;
    let graph = Onnx::parse(&bytes).with_context(|| format!("reading {}", onnx.display()))?;
    weights(&graph)?.write(&out.join("model.safetensors"))?;
    write_json(
        &out.join("config.json"),
        &json!({
            "architectures": ["Dinov2Model"],
            "model_type": "dinov2",
            "apply_layernorm": true,
            "attention_probs_dropout_prob": 0.0,
            "drop_path_rate": 0.0,
            "hidden_act": "gelu",
            "hidden_dropout_prob": 0.0,
            "hidden_size": HIDDEN,
            "image_size": IMAGE,
            "initializer_range": 0.02,
            "layer_norm_eps": 1e-6,
            "layerscale_value": 1.0,
            "mlp_ratio": 4,
            "num_attention_heads": 6,
            "num_channels": 3,
            "num_hidden_layers": LAYERS,
            "patch_size": PATCH,
            "qkv_bias": true,
            "reshape_hidden_states": true,
            "torch_dtype": "float32",
            "use_swiglu_ffn": false,
        }),
    )?;
    write_json(
        &out.join("preprocessor_config.json"),
        &json!({
            "crop_size": { "height": 224, "width": 224 },
            "do_center_crop": true,
            "do_convert_rgb": true,
            "do_normalize": true,
            "do_rescale": true,
            "do_resize": true,
            "image_mean": [0.485, 0.456, 0.406],
            "image_processor_type": "BitImageProcessor",
            "image_std": [0.229, 0.224, 0.225],
            "resample": 3,
            "rescale_factor": 1.0 / 255.0,
            "size": { "shortest_edge": 256 },
        }),
    )
}

/// Every tensor of `Dinov2Model` and its shape.
fn expected() -> BTreeMap<String, Vec<usize>> {
    let patches = (IMAGE / PATCH) * (IMAGE / PATCH);
    let mut shapes = BTreeMap::from([
        ("embeddings.cls_token".to_owned(), vec![1, 1, HIDDEN]),
        ("embeddings.mask_token".to_owned(), vec![1, HIDDEN]),
        ("embeddings.position_embeddings".to_owned(), vec![1, 1 + patches, HIDDEN]),
        ("embeddings.patch_embeddings.projection.weight".to_owned(), vec![HIDDEN, 3, PATCH, PATCH]),
        ("embeddings.patch_embeddings.projection.bias".to_owned(), vec![HIDDEN]),
        ("layernorm.weight".to_owned(), vec![HIDDEN]),
        ("layernorm.bias".to_owned(), vec![HIDDEN]),
    ]);
    for layer in 0..LAYERS {
        let mut insert =
            |part: &str, shape: &[usize]| shapes.insert(format!("encoder.layer.{layer}.{part}"), shape.into());
        for norm in ["norm1", "norm2"] {
            insert(&format!("{norm}.weight"), &[HIDDEN]);
            insert(&format!("{norm}.bias"), &[HIDDEN]);
        }
        insert("layer_scale1.lambda1", &[HIDDEN]);
        insert("layer_scale2.lambda1", &[HIDDEN]);
        let linears = [
            ("attention.attention.query", HIDDEN, HIDDEN),
            ("attention.attention.key", HIDDEN, HIDDEN),
            ("attention.attention.value", HIDDEN, HIDDEN),
            ("attention.output.dense", HIDDEN, HIDDEN),
            ("mlp.fc1", 4 * HIDDEN, HIDDEN),
            ("mlp.fc2", HIDDEN, 4 * HIDDEN),
        ];
        for (linear, outputs, inputs) in linears {
            insert(&format!("{linear}.weight"), &[outputs, inputs]);
            insert(&format!("{linear}.bias"), &[outputs]);
        }
    }
    shapes
}

fn weights(graph: &Onnx) -> Result<Tensors> {
    let mut found = BTreeMap::new();
    for name in graph.names() {
        if let Some(hf_name) = name.strip_prefix(BACKBONE) {
            found.insert(hf_name.to_owned(), graph.tensor(name)?);
        }
    }
    for (hf_name, initializer) in linear_weights(graph)? {
        let (shape, values) = graph.tensor(initializer)?;
        let transposed = transpose(&shape, &values).with_context(|| format!("initialiser `{initializer}`"))?;
        let earlier = found.insert(hf_name.clone(), transposed);
        ensure!(earlier.is_none(), "tensor `{hf_name}` was found twice");
    }
    found.insert("embeddings.position_embeddings".into(), position_embeddings(graph)?);
    // Only masked pretraining reads it; the export has none.
    found.insert("embeddings.mask_token".into(), (vec![1, HIDDEN], vec![0.0; HIDDEN]));

    let expected = expected();
    let missing: Vec<_> = expected.keys().filter(|name| !found.contains_key(*name)).collect();
    let unexpected: Vec<_> = found.keys().filter(|name| !expected.contains_key(*name)).collect();
    ensure!(
        missing.is_empty() && unexpected.is_empty(),
        "the ONNX graph is not DINOv2-small: missing {missing:?}, unexpected {unexpected:?}"
    );
    let mut tensors = Tensors::default();
    for (name, (shape, values)) in found {
        check_shape(&name, &shape, &expected[&name])?;
        tensors.push_f32(name, shape, &values);
    }
    Ok(tensors)
}

/// Pairs of HF weight name and anonymous initialiser, one for each product to which a bias of the backbone is added.
fn linear_weights<'a>(graph: &Onnx<'a>) -> Result<Vec<(String, &'a str)>> {
    let mut adds = HashMap::new(); // input of an Add -> the bias on its other side
    for node in graph.nodes.iter().filter(|node| node.op_type == "Add") {
        let [a, b] = node.inputs[..] else { continue };
        for (x, bias) in [(a, b), (b, a)] {
            if let Some(layer) = bias.strip_prefix(BACKBONE).and_then(|name| name.strip_suffix(".bias")) {
                adds.insert(x, layer);
            }
        }
    }
    let mut pairs = Vec::new();
    for node in graph.nodes.iter().filter(|node| node.op_type == "MatMul") {
        let weight = node.inputs.iter().copied().find(|input| graph.shape(input).is_some());
        let (Some(weight), [product]) = (weight, &node.outputs[..]) else { continue };
        let layer = adds.get(product).with_context(|| format!("no bias is added to the product with `{weight}`"))?;
        pairs.push((format!("{layer}.weight"), weight));
    }
    Ok(pairs)
}

/// The exporter kept the class token's position and the patches' apart: `[1, 1, hidden]` and `[1, patches, hidden]`.
fn position_embeddings(graph: &Onnx) -> Result<(Vec<usize>, Vec<f32>)> {
    let patches = (IMAGE / PATCH) * (IMAGE / PATCH);
    let piece = |count: usize| {
        let fits = |name: &&str| !name.starts_with(BACKBONE) && graph.shape(name) == Some(&[1, count, HIDDEN]);
        let names: Vec<_> = graph.names().filter(fits).collect();
        ensure!(
            names.len() == 1,
            "one anonymous initialiser of shape [1, {count}, {HIDDEN}] is needed, found {names:?}"
        );
        Ok(graph.tensor(names[0])?.1)
    };
    Ok((vec![1, 1 + patches, HIDDEN], [piece(1)?, piece(patches)?].concat()))
}

/// `[rows, columns]` -> `[columns, rows]`
fn transpose(shape: &[usize], values: &[f32]) -> Result<(Vec<usize>, Vec<f32>)> {
    let &[rows, columns] = shape else { anyhow::bail!("it is {shape:?}, expected a matrix") };
    let out = (0..columns).flat_map(|column| (0..rows).map(move |row| values[row * columns + column]));
    Ok((vec![columns, rows], out.collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &[u8] = include_bytes!("../../../fixtures/golden/onnx_file.onnx");

    #[test]
    fn weights_are_found_through_the_bias_added_after_them() {
        let graph = Onnx::parse(FILE).unwrap();
        let pairs = linear_weights(&graph).unwrap();
        let layer = "encoder.layer.0.attention.attention";
        assert_eq!(
            pairs,
            [(format!("{layer}.key.weight"), "onnx::MatMul_1"), (format!("{layer}.query.weight"), "onnx::MatMul_2")]
        );
    }

    #[test]
    fn matrices_are_transposed() {
        let (shape, values) = transpose(&[2, 3], &[0., 1., 2., 3., 4., 5.]).unwrap();
        assert_eq!((shape, values), (vec![3, 2], vec![0., 3., 1., 4., 2., 5.]));
        assert!(transpose(&[6], &[0.; 6]).unwrap_err().to_string().contains("expected a matrix"));
    }

    #[test]
    fn every_name_of_the_model_is_expected_once() {
        assert_eq!(expected().len(), 7 + 18 * LAYERS);
        let parameters: usize = expected().values().map(|shape| shape.iter().product::<usize>()).sum();
        assert_eq!(parameters, 22_056_576); // as transformers counts facebook/dinov2-small
    }

    #[test]
    fn another_graph_is_refused() {
        let graph = Onnx::parse(FILE).unwrap();
        let error = weights(&graph).unwrap_err().to_string();
        assert!(error.contains("one anonymous initialiser of shape [1, 1, 384] is needed, found []"), "{error}");
    }
}
