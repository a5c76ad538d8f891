//! What a decoder says with a PEFT adapter on it: `peft LLM ADAPTER OUT.safetensors ID…` writes `input_ids` `[1, seq]`
//! and `logits` `[1, seq, vocab]` in f32, to compare with PEFT's own (`fixtures/check_peft.py`). Where the folder ADAPTER
//! is not there yet, a random adapter is made and written first: ranks by pattern, rank-stabilised scaling.

use std::path::Path;

use anyhow::{Context, Result};
use tch::{Device, Kind, Tensor};
use vora_llm::{AttentionPlan, CausalLm, LlmConfig, VisionAttention};
use vora_lora::{AdapterFolder, BaseModel, LoraConfig, attach_all, save_adapter};
use vora_text::Spans;
use vora_torch::weights::Weights;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [llm_folder, adapter, out, ids @ ..] = arguments.as_slice() else {
        anyhow::bail!("usage: peft LLM ADAPTER OUT.safetensors ID…")
    };
    let ids = ids.iter().map(|id| id.parse().with_context(|| format!("`{id}` is no token id")));
    let ids = Tensor::from_slice(&ids.collect::<Result<Vec<i64>>>()?).unsqueeze(0); // [1, seq]
    let (llm_folder, adapter) = (Path::new(llm_folder), Path::new(adapter));
    if !adapter.exists() {
        make(llm_folder, adapter)?;
    }

    let mut llm = load(llm_folder)?;
    AdapterFolder::open(adapter)?.attach("check", Device::Cpu, |visit| llm.linears_mut(visit))?;
    let spans = Spans::text(&[ids.size()[1]]);
    let plan = AttentionPlan::new(&spans, VisionAttention::Bidirectional, Device::Cpu, Kind::Float)?;
    let logits = tch::no_grad(|| llm.logits(&llm.decoder().forward(&llm.embed(&ids), &plan, 0).last_hidden_state));
    let tensors = [("input_ids".to_owned(), ids), ("logits".to_owned(), logits)];
    vora_torch::checkpoint::save(Path::new(out), &tensors, &[])
}

fn load(folder: &Path) -> Result<CausalLm> {
    let weights = Weights::open(folder, Device::Cpu, Kind::Float)?;
    let llm = CausalLm::load(&LlmConfig::open(folder)?, &weights)?;
    weights.finish()?;
    Ok(llm)
}

/// A new adapter with `B` away from zero, as training leaves it.
#[allow(clippy::disallowed_methods, reason = "nothing draws beside it")]
fn make(llm_folder: &Path, folder: &Path) -> Result<()> {
    let config = LoraConfig {
        lora_alpha: Some(6.0),
        rank_pattern: [("down_proj".into(), 8), ("0.self_attn.[qk]_proj".into(), 2)].into(),
        alpha_pattern: [("1.mlp.up_proj".into(), 3.0)].into(),
        use_rslora: true,
        ..LoraConfig::new(4, 2)
    };
    let mut llm = load(llm_folder)?;
    let weights = Weights::random(1, Device::Cpu, Kind::Float);
    attach_all("new", &config, &weights, |visit| llm.linears_mut(visit))?;
    tch::manual_seed(1);
    for (name, tensor) in weights.parameters() {
        if name.contains("lora_B") {
            let random = Tensor::randn_like(&tensor) * 0.2;
            tch::no_grad(|| tensor.shallow_clone().copy_(&random));
        }
    }
    save_adapter(folder, &config, BaseModel::causal_lm(&llm_folder.display().to_string()), &weights.parameters())
}
