//! What a VoRA folder's decoder says after each of some tokens, without a picture: `logits FOLDER OUT.safetensors ID…`
//! writes `input_ids` `[1, seq]` and `logits` `[1, seq, vocab]` in f32, to compare with what another program makes of
//! the same folder (`fixtures/check_merged.py`).

use std::path::Path;

use anyhow::{Context, Result};
use tch::{Device, Kind, Tensor};
use vora_llm::Spans;
use vora_model::{Input, VisionLanguageModel, Vora};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [folder, out, ids @ ..] = arguments.as_slice() else {
        anyhow::bail!("usage: logits FOLDER OUT.safetensors ID…")
    };
    let ids = ids.iter().map(|id| id.parse().with_context(|| format!("`{id}` is no token id")));
    let ids = ids.collect::<Result<Vec<i64>>>()?;

    let model = Vora::open(Path::new(folder), Device::Cpu, Kind::Float)?;
    let spans = Spans::text(&[ids.len() as i64]);
    let input = Input { input_ids: Tensor::from_slice(&ids).unsqueeze(0), pixel_values: Vec::new(), spans };
    let logits = tch::no_grad(|| anyhow::Ok(model.llm().logits(&model.forward(&input, 0)?.last_hidden_state)))?;
    let tensors = [("input_ids".to_owned(), input.input_ids), ("logits".to_owned(), logits)];
    vora_torch::safetensors::save(Path::new(out), &tensors, &[])
}
