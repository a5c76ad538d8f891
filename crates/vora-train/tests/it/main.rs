//! A whole training step against the reference: Hugging Face's Llama and DINOv2, PEFT's adapters, torch's autograd.

mod eyes;
mod gemma4;
mod official;
mod outline;
mod packing;
mod shaped;
mod spoken;
mod taught;

use serde_json::json;
use tch::{Device, Kind, Tensor};
use vora_llm::LlmConfig;
use vora_lora::LoraConfig;
use vora_model::{Input, VisionLanguageModel, Vora, VoraConfig};
use vora_recipe::Pairing;
use vora_student::heads::DistillHeads;
use vora_text::{Span, Spans};
use vora_torch::nn::loss::cross_entropy;
use vora_torch::weights::Weights;
use vora_vision::Dinov2Config;

const ADAPTED: i64 = 2;

/// The model of `fixtures/generate/vora.py`, and its source of weights.
fn model(golden: &fixtures::Golden) -> (Vora, DistillHeads, Weights) {
    let llm: LlmConfig = serde_json::from_value(json!({
        "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": true,
    }))
    .unwrap();
    let mut config = VoraConfig::new(llm, 12, 4, 8);
    config.lora = Some(LoraConfig::new(4, ADAPTED));
    let weights = Weights::from_tensors(golden.under("weights."), Device::Cpu, Kind::Float);
    let model = Vora::load(config, &weights).unwrap();
    let pairs = (0..ADAPTED as usize).map(|block| (block, block)).collect();
    let heads = DistillHeads::load(pairs, 32, 16, Pairing::Output, &weights.pp("aux_vision")).unwrap();
    weights.finish().unwrap();
    (model, heads, weights)
}

fn input(golden: &fixtures::Golden) -> Input {
    let plain = vec![Span::text(3), Span::image(2, 2), Span::text(5)];
    let two_questions = vec![Span::text(2), Span::image(2, 2), Span::text(3).on_branch(0), Span::text(3).on_branch(1)];
    Input::new(
        golden["input_ids"].shallow_clone(),
        golden["pixel_values"].unbind(0),
        Spans::new(vec![plain, two_questions]),
    )
}

/// What the teacher says of the pictures, per block `[image tokens, hidden]`.
fn teacher(golden: &fixtures::Golden) -> Vec<Tensor> {
    let config: Dinov2Config = serde_json::from_value(json!({
        "model_type": "dinov2", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2,
        "image_size": 8, "patch_size": 4, "hidden_act": "gelu", "layer_norm_eps": 1e-6, "qkv_bias": true,
        "layerscale_value": 1.0, "use_swiglu_ffn": false,
    }))
    .unwrap();
    let weights = Weights::from_tensors(golden.under("teacher."), Device::Cpu, Kind::Float);
    let dinov2 = config.load(&weights).unwrap();
    weights.finish().unwrap();
    let states = tch::no_grad(|| dinov2.hidden_states(&golden["pixel_values"]));
    states[1..].iter().map(|state| dinov2.patch_tokens(state).flatten(0, 1)).collect()
}

#[test]
fn a_whole_step_is_that_of_the_reference() {
    let golden = fixtures::open("vora");
    let (model, heads, weights) = model(&golden);
    let input = input(&golden);
    let output = model.forward(&input, ADAPTED as usize).unwrap();
    fixtures::assert_close(&output.hidden_states[1], &golden["hidden_1"]);
    fixtures::assert_close(&output.hidden_states[2], &golden["hidden_2"]);
    let hidden = output.last_hidden_state.flatten(0, 1); // [batch * seq, hidden]
    fixtures::assert_close(&model.llm().logits(&hidden), &golden["logits"].flatten(0, 1));

    // A label is predicted one place before its own.
    let labels = golden["labels"].flatten(0, 1);
    let places = labels.not_equal(-100).nonzero().squeeze_dim(1);
    let rows = hidden.index_select(0, &(&places - 1));
    let targets = labels.index_select(0, &places);
    let loss_lm = cross_entropy(&rows, &targets, 1 << 10, |h| model.llm().logits(h)) / targets.size()[0] as f64;
    fixtures::assert_close(&loss_lm, &golden["loss_lm"]);
    let image_places = Tensor::from_slice(&input.spans.image_positions());
    let loss_distill = heads.losses(&output.hidden_states, &image_places, &teacher(&golden)); // [blocks]
    fixtures::assert_close(&loss_distill, &golden["loss_distill"]);

    (loss_lm + loss_distill.mean(Kind::Float)).backward();
    let parameters = weights.parameters();
    assert_eq!(parameters.len(), 2 * 7 * ADAPTED as usize + 5 + 2 * ADAPTED as usize);
    for (name, parameter) in parameters {
        let expected = &golden[&format!("grads.{name}")];
        assert!(expected.abs().max().double_value(&[]) > 1e-5, "{name}: the reference has no gradient to compare");
        fixtures::assert_close(&parameter.grad(), expected);
    }
}

#[test]
fn merged_is_what_peft_merges() {
    let golden = fixtures::open("vora");
    let (mut model, _, _) = model(&golden);
    model.merge().unwrap();
    let output = tch::no_grad(|| model.forward(&input(&golden), 0)).unwrap();
    let logits = model.llm().logits(&output.last_hidden_state);
    fixtures::assert_close(&logits, &golden["merged_logits"]);
    // Merging changed how the model computes, not what.
    fixtures::assert_close(&logits, &golden["logits"]);
}
