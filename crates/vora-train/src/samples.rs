//! Pictures that were held out, as files with a question each, to ask the trained model about.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;
use vora_torch::safetensors::write_bytes;
use vora_vision::{ImageProcessor, Pixels, RgbImage};

use crate::data::HeldOut;

/// A line of `questions.jsonl`.
#[derive(Debug, Serialize)]
struct Question {
    image: String,
    question: String,
    answer: String,
    kind: String,
    split: String,
}

/// Writes the first `count` pictures of each split, as the model sees them, and `questions.jsonl` with one question
/// about each, of whatever kind was asked least before it.
pub fn write(folder: &Path, splits: &[HeldOut], processor: &ImageProcessor, count: u64) -> Result<()> {
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
    let mut asked: BTreeMap<String, u64> = BTreeMap::new();
    let mut lines = String::new();
    for index in 0..count {
        for split in splits.iter().filter(|split| index < split.samples) {
            let Ok(sample) = split.source.sample(index) else { continue };
            let least = sample.questions.iter().min_by_key(|q| asked.get(&q.kind).copied().unwrap_or(0));
            let (Some(question), [picture]) = (least, sample.images.as_slice()) else { continue };
            *asked.entry(question.kind.clone()).or_default() += 1;
            let image = format!("{}-{index}.png", split.name);
            let path = folder.join(&image);
            seen(picture, processor).save(&path).with_context(|| format!("cannot write {}", path.display()))?;
            lines += &serde_json::to_string(&Question {
                image,
                question: question.question.clone(),
                answer: question.answer.clone(),
                kind: question.kind.clone(),
                split: split.name.clone(),
            })?;
            lines.push('\n');
        }
    }
    write_bytes(&folder.join("questions.jsonl"), lines.as_bytes())
}

/// The picture that a model is shown, normalisation undone.
fn seen(pixels: &Pixels, processor: &ImageProcessor) -> RgbImage {
    let (mean, std) = processor.mean_std();
    let area = pixels.height * pixels.width;
    RgbImage::from_fn(pixels.width as u32, pixels.height as u32, |x, y| {
        let at = y as usize * pixels.width + x as usize;
        let byte = |channel: usize| {
            let value = f64::from(pixels.data[channel * area + at]) * std[channel] + mean[channel];
            (value * 255.0).round().clamp(0.0, 255.0) as u8
        };
        [byte(0), byte(1), byte(2)].into()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use vora_vision::{IMAGENET_DEFAULT, Resample};

    #[test]
    fn a_processed_picture_comes_back() {
        let (mean, std) = IMAGENET_DEFAULT;
        let processor = ImageProcessor::square(8, mean, std, Resample::Bicubic);
        let picture = RgbImage::from_fn(8, 8, |x, y| [(x * 30) as u8, (y * 30) as u8, 255].into());
        assert_eq!(seen(&processor.preprocess(&picture).unwrap(), &processor), picture);
    }
}
