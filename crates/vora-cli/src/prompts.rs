//! Questions about pictures, by whose logits a change to the weights is judged.

use std::path::Path;

use anyhow::Result;
use tch::{Kind, Tensor};
use vora_data::scenes::{Scenes, ScenesConfig, Split};
use vora_image::ImageProcessor;
use vora_model::{Input, VisionLanguageModel};
use vora_text::{ChatTemplate, Message, Tokenizer};

/// How many pictures are asked about.
const PICTURES: u64 = 8;

/// Questions about pictures, just as `vora ask` would put them.
pub(crate) fn prompts(folder: &Path, model: &dyn VisionLanguageModel) -> Result<Vec<Input>> {
    let scenes = Scenes::new(ScenesConfig::default(), Split::Test)?;
    let (tokenizer, chat) =
        (Tokenizer::open(folder)?.for_processor(model.has_processor()), ChatTemplate::open(folder)?);
    let processor = ImageProcessor::open(folder)?;
    let pieces = chat.encode_prompt(&tokenizer, &[Message::question_about(1, "What is in the picture?")])?;
    (0..PICTURES)
        .map(|index| {
            let picture = vora_vision::pixel_values(&processor.preprocess(&scenes.render(index))?);
            Input::prompt(&pieces, vec![picture], model)
        })
        .collect()
}

/// Logits at every word of every prompt, `[words, vocab]`; none where there is no prompt. What a picture's own places
/// would say next means nothing: no one is ever asked there.
pub(crate) fn logits(model: &dyn VisionLanguageModel, prompts: &[Input]) -> Result<Option<Tensor>> {
    let mut rows = Vec::new();
    for prompt in prompts {
        let output = tch::no_grad(|| model.forward(prompt, 0))?;
        let pictures = prompt.spans.image_positions();
        let words: Vec<i64> = (0..prompt.spans.seq()).filter(|place| !pictures.contains(place)).collect();
        let hidden = output.last_hidden_state.squeeze_dim(0).index_select(0, &Tensor::from_slice(&words)); // [words, hidden]
        rows.push(tch::no_grad(|| model.llm().logits(&hidden).to_kind(Kind::Float)));
    }
    Ok((!rows.is_empty()).then(|| Tensor::cat(&rows, 0)))
}

/// At how many places the likeliest token is the same, of logits `[words, vocab]`.
pub(crate) fn same_likeliest(before: &Tensor, after: &Tensor) -> i64 {
    after.argmax(-1, false).eq_tensor(&before.argmax(-1, false)).sum(Kind::Int64).int64_value(&[])
}
