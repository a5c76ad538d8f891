//! Pictures that were held out, as files with a question each, to ask the trained model about.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use vora_data::IMAGE_PLACE;
use vora_data::{QuestionSpan, Sample, collate};
use vora_image::{ImageProcessor, Pixels, RgbImage};
use vora_run::samples::Question;
use vora_text::Tokenizer;

use crate::data::HeldOut;
use vora_student::{DeviceBatch, Student};

/// Samples that are looked at for each that is chosen.
const LOOKED_AT: u64 = 8;

/// A held-out sample with the one of its questions that is shown.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Shown {
    /// Its split and its place there.
    pub name: String,
    /// The split's name.
    pub split: String,
    /// The sample, of one picture.
    pub sample: Sample,
    /// Which of its questions.
    pub question: usize,
}

impl Shown {
    /// Its picture, as it goes into the model.
    pub fn picture(&self) -> &Pixels {
        &self.sample.images[0]
    }

    /// Its picture as a person sees it: normalisation undone.
    pub fn seen(&self, processor: &ImageProcessor) -> RgbImage {
        seen(self.picture(), processor)
    }

    /// The question, and the answer that is right.
    pub fn question(&self) -> &QuestionSpan {
        &self.sample.questions[self.question]
    }
}

/// The first `count` samples of each split that have one picture, another than those before, with a question each, of
/// whatever question type was asked least before it. Of a split that asks much about each picture some more are looked at, but
/// not all.
pub fn choose(splits: &[HeldOut], count: u64) -> Vec<Shown> {
    let mut asked: BTreeMap<String, u64> = BTreeMap::new();
    let mut shown: Vec<Shown> = Vec::new();
    let mut next = vec![0; splits.len()];
    for _ in 0..count {
        for (split, next) in splits.iter().zip(&mut next) {
            let last = split.samples.min(count * LOOKED_AT);
            let of_another_picture = |index: u64| {
                let sample = split.source.sample(index).ok()?;
                let is_new = sample.images.len() == 1 && shown.iter().all(|s| s.picture() != &sample.images[0]);
                (is_new && !sample.questions.is_empty()).then_some((index, sample))
            };
            let found = (*next..last).find_map(of_another_picture);
            *next = found.as_ref().map_or(last, |(index, _)| index + 1);
            let Some((index, mut sample)) = found else { continue };
            let asked_before = |question: &QuestionSpan| asked.get(&question.kind).copied().unwrap_or(0);
            let least = (0..sample.questions.len()).min_by_key(|i| asked_before(&sample.questions[*i]));
            let Some(question) = least else { continue };
            let about = &mut sample.questions[question];
            about.question = about.question.replace(IMAGE_PLACE, "").trim().to_owned(); // the picture stands beside it
            *asked.entry(about.kind.clone()).or_default() += 1;
            shown.push(Shown { name: format!("{}-{index}", split.name), split: split.name.clone(), sample, question });
        }
    }
    shown
}

/// Writes pictures, as the model sees them, and `questions.jsonl` with the question about each.
///
/// # Errors
/// Where the folder or a file cannot be written.
pub fn write(folder: &Path, shown: &[Shown], processor: &ImageProcessor) -> Result<()> {
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
    let mut questions = Vec::new();
    for shown in shown {
        let image = format!("{}.png", shown.name);
        let path = folder.join(&image);
        shown.seen(processor).save(&path).with_context(|| format!("cannot write {}", path.display()))?;
        let QuestionSpan { kind, question, answer, .. } = shown.question().clone();
        questions.push(Question { image, question, answer, kind, split: shown.split.clone() });
    }
    vora_run::samples::write(folder, &questions)
}

/// What the model answers, as far as one pass with the right answers shows it: greedy decoding gives the right tokens up
/// to the first that is not the likeliest, and then the one that is; where it does not end the answer, ` …` stands
/// for what would follow.
///
/// # Errors
/// Where a picture does not fit the model, or a token is none of the tokenizer's.
pub fn answers(student: &Student, tokenizer: &Tokenizer, shown: &[Shown], batch_size: usize) -> Result<Vec<String>> {
    let mut answers = Vec::new();
    for chunk in shown.chunks(batch_size) {
        let batch = collate(chunk.iter().map(|shown| shown.sample.clone()).collect(), 0);
        let uploaded = DeviceBatch::new(&batch, student.device());
        let likeliest = tch::no_grad(|| anyhow::Ok(student.answer_logits(&uploaded)?.argmax(-1, false)))?;
        let (likeliest, right) = (Vec::<i64>::try_from(likeliest)?, batch.supervised().targets);
        let mut questions = batch.questions();
        for shown in chunk {
            let (_, tokens) = questions.nth(shown.question).context("a sample has lost a question")?;
            let others = shown.sample.questions.len() - shown.question - 1;
            questions.by_ref().take(others).for_each(drop);
            answers.push(begun(&likeliest[tokens.clone()], &right[tokens], tokenizer)?);
        }
    }
    Ok(answers)
}

/// The beginning of an answer, of which the likeliest tokens are known as long as all before them are right.
fn begun(likeliest: &[i64], right: &[i64], tokenizer: &Tokenizer) -> Result<String> {
    let wrong = likeliest.iter().zip(right).position(|(found, right)| found != right);
    let said = wrong.map_or(likeliest, |wrong| &likeliest[..=wrong]);
    let text = tokenizer.decode(said, true)?;
    let goes_on = wrong.is_some_and(|wrong| !tokenizer.eos_ids().contains(&likeliest[wrong]));
    Ok(if goes_on { format!("{} …", text.trim()) } else { text.trim().to_owned() })
}

/// The picture that a model is shown, normalisation undone.
pub fn seen(pixels: &Pixels, processor: &ImageProcessor) -> RgbImage {
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
    use std::sync::Arc;
    use vora_data::Source;
    use vora_image::{IMAGENET_DEFAULT, Resample};

    #[test]
    fn a_processed_picture_comes_back() {
        let (mean, std) = IMAGENET_DEFAULT;
        let processor = ImageProcessor::square(8, mean, std, Resample::Bicubic);
        let picture = RgbImage::from_fn(8, 8, |x, y| [(x * 30) as u8, (y * 30) as u8, 255].into());
        assert_eq!(seen(&processor.preprocess(&picture).unwrap(), &processor), picture);
    }

    /// Two samples about every picture of one shade, but one of each ten without a picture.
    struct TwoOfEach;

    impl Source for TwoOfEach {
        fn len(&self) -> Option<u64> {
            Some(100)
        }

        fn sample(&self, index: u64) -> Result<Sample> {
            let pixels = Pixels { data: vec![(index / 2) as f32; 3], height: 1, width: 1 };
            let [kind, question, answer] = ["turn", "<image>\nWhat?", "That."].map(str::to_owned);
            Ok(Sample {
                id: index.to_string(),
                input_ids: vec![1],
                targets: vec![2],
                spans: Vec::new(),
                images: if index % 10 == 3 { Vec::new() } else { vec![pixels] },
                questions: vec![QuestionSpan { kind, question, answer, tokens: 0..1, is_rejected: false }],
                cut_answers: 0,
                notes: Vec::new(),
            })
        }
    }

    #[test]
    fn every_sample_shows_another_picture() {
        let split = |name: &str, samples| HeldOut { name: name.to_owned(), source: Arc::new(TwoOfEach), samples };
        let names = |count| {
            let shown = choose(&[split("a", 100), split("b", 15)], count);
            shown.into_iter().map(|shown| shown.name).collect::<Vec<_>>()
        };
        // b has the same pictures, and goes on where a did not get yet.
        assert_eq!(choose(&[split("a", 1)], 1)[0].question().question, "What?");
        assert_eq!(names(2), ["a-0", "b-2", "a-4", "b-6"]);
        let many = names(20);
        let of_b = many.iter().filter(|name| name.starts_with('b')).count();
        assert_eq!((many.len(), of_b), (24, 4), "{many:?}: b has eight pictures, of which a took every other");
    }

    #[test]
    fn an_answer_is_known_up_to_its_first_wrong_token() {
        let tokenizer = Tokenizer::open(&fixtures::root().join("tiny/llm")).unwrap();
        let eos = tokenizer.eos_ids()[0];
        let [red, blue] = ["red", "blue"].map(|text| tokenizer.encode(text).unwrap());
        let mut right = red.clone();
        right.push(eos);
        assert_eq!(begun(&right, &right, &tokenizer).unwrap(), "red");
        // It would have gone on; and with what, after a wrong token, nobody knows.
        let longer = [&red[..], &blue[..1]].concat();
        let said = begun(&longer, &right, &tokenizer).unwrap();
        assert!(said.starts_with("red") && said.ends_with(" …"), "{said}");
        assert_eq!(begun(&[eos, red[0]], &right[..2], &tokenizer).unwrap(), "");
        assert_eq!(begun(&[1 << 20], &right[..1], &tokenizer).unwrap(), " …");
    }
}
