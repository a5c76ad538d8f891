//! How the tests of every family compare an encoder with Hugging Face's.

use tch::{Device, Kind, Tensor};
use vora_torch::weights::Weights;

use crate::encoder::EncoderConfig;
use crate::transformer::VisionTransformer;

/// The `config.json` that lies beside a golden file.
pub(crate) fn json(name: &str) -> serde_json::Value {
    let path = fixtures::root().join(format!("golden/{name}.json"));
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// The encoder of a golden file, from tensors that must all be known.
pub(crate) fn load(name: &str, tensors: Vec<(String, Tensor)>, kind: Kind) -> VisionTransformer {
    let config = EncoderConfig::from_json(&json(name)).unwrap();
    let weights = Weights::from_tensors(tensors, Device::Cpu, kind);
    let model = config.load(&weights).unwrap();
    weights.finish_allowing(|name| config.leaves_out(name)).unwrap();
    model
}

/// Every hidden state and the last norm, at each size; the first size comes again at the end.
pub(crate) fn matches_reference(name: &str, sizes: &[&str]) {
    let golden = fixtures::open(name);
    let model = load(name, golden.under("weights."), Kind::Float);
    for size in sizes.iter().chain(&sizes[..1]) {
        for (state, expected) in states(&model, &golden, size).iter().zip(expected(&model, &golden, size)) {
            fixtures::assert_close_to(state, &expected, 2e-5);
        }
    }
}

/// In bf16 states are as far from f32 as Hugging Face's own bf16 is. What is compared is the largest difference of each state,
/// one number of hundreds: another order of rounding moves it by a factor of two, its mean over the states by a quarter.
pub(crate) fn rounds_as_the_reference(name: &str, sizes: &[&str]) {
    let golden = fixtures::open(name);
    let model = load(name, golden.under("weights."), Kind::BFloat16);
    let mut of_theirs = Vec::new();
    for size in sizes {
        let theirs = Vec::<f64>::try_from(&golden[&format!("{size}.bf16_difference")].to_kind(Kind::Double)).unwrap();
        let states = states(&model, &golden, size);
        assert_eq!(states.len(), theirs.len());
        for ((state, expected), theirs) in states.iter().zip(expected(&model, &golden, size)).zip(theirs) {
            assert_eq!(state.kind(), Kind::BFloat16);
            fixtures::assert_close_to(state, &expected, 2.5 * theirs);
            let difference = (state.to_kind(Kind::Float) - expected).abs().max().double_value(&[]);
            of_theirs.push(difference / theirs.max(f64::MIN_POSITIVE));
        }
    }
    let mean = of_theirs.iter().sum::<f64>() / of_theirs.len() as f64;
    assert!(
        mean < 1.3,
        "{name}: differences are {mean} of the reference's, on the mean over {} states",
        of_theirs.len()
    );
}

/// What the encoder makes of the pictures of one size: all hidden states, then the last one normed.
fn states(model: &VisionTransformer, golden: &fixtures::Golden, size: &str) -> Vec<Tensor> {
    let mut states = model.hidden_states(&golden[&format!("{size}.pixel_values")]);
    states.push(model.last_hidden_state(&states[states.len() - 1]));
    states
}

fn expected(model: &VisionTransformer, golden: &fixtures::Golden, size: &str) -> Vec<Tensor> {
    (0..=model.num_hidden_layers())
        .map(|i| format!("{size}.hidden_states.{i}"))
        .chain([format!("{size}.last_hidden_state")])
        .map(|name| golden[&name].shallow_clone())
        .collect()
}
