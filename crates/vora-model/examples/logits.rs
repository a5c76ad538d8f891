//! What a VoRA folder says after each of some tokens: `logits FOLDER OUT.safetensors [--pictures FILE] ID…`, where `image`
//! among the ids is the place of a picture, `pixel_values` of FILE one after the other. It writes `input_ids` `[1, seq]`
//! and `logits` `[1, seq, vocab]` in f32, to compare with what another program makes of the same folder
//! (`fixtures/check_merged.py`, `fixtures/generate/official.py`).

use std::path::Path;

use anyhow::{Context, Result};
use tch::{Device, Kind};
use vora_model::{Input, VisionLanguageModel, Vora};
use vora_text::Piece;
use vora_torch::checkpoint::Checkpoint;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [folder, out, rest @ ..] = arguments.as_slice() else {
        anyhow::bail!("usage: logits FOLDER OUT.safetensors [--pictures FILE] ID…")
    };
    let (pictures, ids) = match rest {
        [flag, file, ids @ ..] if flag == "--pictures" => {
            (Checkpoint::open(Path::new(file))?.tensor("pixel_values")?.unbind(0), ids)
        }
        ids => (Vec::new(), ids),
    };
    let piece = |id: &String| match id.as_str() {
        "image" => Ok(Piece::Image),
        id => Ok(Piece::Text {
            ids: vec![id.parse().with_context(|| format!("`{id}` is no token id"))?],
            supervised: false,
        }),
    };
    let pieces = ids.iter().map(piece).collect::<Result<Vec<_>>>()?;

    let model = Vora::open(Path::new(folder), Device::Cpu, Kind::Float)?;
    let input = Input::prompt(&pieces, pictures, &model)?;
    let logits = tch::no_grad(|| anyhow::Ok(model.llm().logits(&model.forward(&input, 0)?.last_hidden_state)))?;
    let tensors = [("input_ids".to_owned(), input.input_ids), ("logits".to_owned(), logits)];
    vora_torch::checkpoint::save(Path::new(out), &tensors, &[])
}
