//! Decoders all of whose weights are trained, against HF's gradients.

use std::collections::BTreeMap;

use fixtures::{Golden, assert_close_to};
use tch::{Device, Kind, Reduction, Tensor};
use vora_text::Spans;
use vora_torch::weights::Weights;

use super::CausalLm;
use crate::{AttentionPlan, LlmConfig, VisionAttention};

fn cases() -> BTreeMap<String, LlmConfig> {
    let path = fixtures::root().join("golden/llm_gradients.json");
    let cases: BTreeMap<String, LlmConfig> = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    assert_eq!(cases.len(), 5);
    cases
}

/// The mean cross-entropy of every next token, and its gradient by every weight.
fn loss_and_gradients(
    golden: &Golden,
    name: &str,
    config: &LlmConfig,
    kind: Kind,
) -> (Tensor, BTreeMap<String, Tensor>) {
    let weights = Weights::from_tensors(golden.under(&format!("{name}.weights.")), Device::Cpu, kind);
    let llm = CausalLm::load(config, &weights.trained()).unwrap();
    weights.finish().unwrap();
    let (input_ids, config) = (&golden["input_ids"], llm.config());
    let (batch, seq) = input_ids.size2().unwrap();
    let spans = Spans::text(&vec![seq; batch as usize]);
    let plan = AttentionPlan::new(&spans, VisionAttention::Causal, Device::Cpu, kind).unwrap();
    let output = llm.decoder().forward(&llm.embed(input_ids), &plan, config.num_hidden_layers);
    for hidden in &output.hidden_states {
        assert_eq!(hidden.kind(), kind, "{name}");
    }
    let logits = llm.logits(&output.last_hidden_state.narrow(1, 0, seq - 1)); // [batch, seq - 1, vocab]
    assert_eq!(logits.kind(), kind, "{name}");
    let logits = logits.to_kind(Kind::Float).reshape([-1, config.vocab_size]);
    let targets = input_ids.narrow(1, 1, seq - 1).reshape([-1]);
    let loss = logits.cross_entropy_loss::<Tensor>(&targets, None, Reduction::Mean, -100, 0.0);
    loss.backward();

    let parameters = weights.parameters();
    let of_checkpoint: BTreeMap<String, Tensor> = llm.tensors().into_iter().collect();
    assert_eq!(parameters.len(), of_checkpoint.len(), "{name}");
    let gradients = parameters.into_iter().map(|(weight, tensor)| {
        let gradient = tensor.grad();
        assert!(gradient.defined(), "{name}: no gradient reaches {weight}");
        assert_eq!((tensor.kind(), gradient.kind()), (Kind::Float, Kind::Float), "{name}: {weight}");
        assert_eq!(tensor.data_ptr(), of_checkpoint[&weight].data_ptr(), "{name}: {weight} is saved as it is trained");
        (weight, gradient)
    });
    (loss.detach(), gradients.collect())
}

#[test]
fn gradients_of_every_weight_match_reference() {
    let golden = fixtures::open("llm_gradients");
    for (name, config) in cases() {
        let (loss, gradients) = loss_and_gradients(&golden, &name, &config, Kind::Float);
        assert_close_to(&loss, &golden[&format!("{name}.loss")], 1e-5);
        let expected = golden.under(&format!("{name}.grad."));
        assert_eq!(gradients.len(), expected.len(), "{name}");
        for (weight, expected) in expected {
            assert_close_to(&gradients[&weight], &expected, 1e-5);
        }
    }
}

/// HF's gradients in bf16 are so far from those in f32: those of our masters must be no more than twice as far.
#[test]
fn masters_of_a_bf16_decoder_get_gradients_as_close_as_the_references() {
    let golden = fixtures::open("llm_gradients");
    for (name, config) in cases() {
        let (_, gradients) = loss_and_gradients(&golden, &name, &config, Kind::BFloat16);
        let difference =
            |(weight, expected): &(String, Tensor)| (&gradients[weight] - expected).abs().max().double_value(&[]);
        let found = golden.under(&format!("{name}.grad.")).iter().map(difference).fold(0.0, f64::max);
        let allowed = 2.0 * golden[&format!("{name}.bf16_difference")].double_value(&[]);
        assert!(found <= allowed, "{name}: gradients differ by {found}, allowed {allowed}");
    }
}

/// HF's `_init_weights`: matrices normal with `initializer_range`, norms one, biases zero.
#[test]
fn a_new_decoder_starts_as_hf_starts_it() {
    for (_, config) in cases() {
        let config = LlmConfig { hidden_size: 64, num_attention_heads: 4, initializer_range: Some(0.05), ..config };
        let weights = Weights::random(11, Device::Cpu, Kind::BFloat16).trained();
        CausalLm::load(&config, &weights).unwrap();
        for (name, tensor) in weights.parameters() {
            let (mean, std) = (tensor.mean(Kind::Float), tensor.std(false));
            let (mean, std) = (mean.double_value(&[]), std.double_value(&[]));
            if name.ends_with("bias") {
                assert_eq!((mean, std), (0.0, 0.0), "{name}");
            } else if name.contains("norm") {
                assert_eq!((mean, std), (1.0, 0.0), "{name}");
            } else {
                assert!(mean.abs() < 5e-3 && (std - 0.05).abs() < 5e-3, "{name}: mean {mean}, deviation {std}");
            }
        }
    }
}

/// Training moves the loss down through generation's own forwards too: nothing holds an older copy of a weight.
#[test]
fn steps_change_what_is_generated() {
    let golden = fixtures::open("llm_gradients");
    let config = &cases()["llama_tied"];
    let weights = Weights::from_tensors(golden.under("llama_tied.weights."), Device::Cpu, Kind::BFloat16);
    let llm = CausalLm::load(config, &weights.trained()).unwrap();
    let plan = AttentionPlan::new(&Spans::text(&[9]), VisionAttention::Causal, Device::Cpu, Kind::BFloat16).unwrap();
    let prompt = golden["input_ids"].narrow(0, 0, 1);
    let target = 5;
    let log_probability = || {
        let mut cache = llm.new_cache(1, 10).unwrap();
        let logits = llm.prefill(&llm.embed(&prompt), &plan, &mut cache).unwrap();
        logits.log_softmax(-1, Kind::Float).double_value(&[0, target])
    };
    let before = log_probability();
    for _ in 0..5 {
        let hidden = llm.decoder().forward(&llm.embed(&prompt), &plan, 0).last_hidden_state.select(1, -1);
        (-llm.logits(&hidden).log_softmax(-1, Kind::Float).select(1, target)).sum(Kind::Float).backward();
        for (_, mut tensor) in weights.parameters() {
            tch::no_grad(|| tensor -= tensor.grad() * 0.05);
            tensor.zero_grad();
        }
    }
    let after = log_probability();
    assert!(after > before + 0.5, "log probability {before} before, {after} after");
}
