//! What a Chameleon may write: words, a picture, or both, by leaving out the logits of what may not come next.

use std::collections::HashSet;

use anyhow::{Result, ensure};
use vora_model::{ImageWriter, Input};

use crate::Sampler;
use crate::error::InferError;

/// What a generation is to be made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutputModality {
    /// Words: every token but those of images, as in Hugging Face's forward.
    Text,
    /// One picture: the token that begins it, its tokens, the token that ends it. Nothing comes after.
    Image,
    /// Words and pictures as the model likes. A picture that was begun gets all its tokens and its end; one that would
    /// not have room for them is not begun.
    Interleaved,
}

/// An [`OutputModality`] over the tokens of one model. Every picture fills the model's
/// [`drawn_grid`](ImageWriter::drawn_grid).
#[derive(Debug)]
pub struct Constraint<'a> {
    model: &'a dyn ImageWriter,
    modality: OutputModality,
    image_tokens: usize, // of a picture
    is_image: Vec<bool>, // of every token of the vocabulary
}

/// What may come next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Allowed {
    /// Every token that makes no picture.
    Words,
    /// These without the one that begins a picture.
    WordsAlone,
    /// Every token that makes a picture.
    ImageTokens,
    /// This alone.
    Only(i64),
}

impl<'a> Constraint<'a> {
    /// For the tokens of `model`.
    pub fn new(modality: OutputModality, model: &'a dyn ImageWriter) -> Self {
        let mut is_image = vec![false; usize::try_from(model.llm().config().vocab_size).unwrap_or(0)];
        for &id in model.image_vocabulary() {
            if let Some(is_image) = usize::try_from(id).ok().and_then(|id| is_image.get_mut(id)) {
                *is_image = true;
            }
        }
        let (rows, cols) = model.drawn_grid();
        Self { model, modality, image_tokens: (rows * cols) as usize, is_image }
    }

    /// What is allowed.
    pub(crate) fn modality(&self) -> OutputModality {
        self.modality
    }

    /// The model whose tokens they are.
    pub fn model(&self) -> &'a dyn ImageWriter {
        self.model
    }

    /// Where a generation of at most `max_new_tokens` after `prompt` (one row) starts: within a picture if the prompt
    /// has begun one.
    ///
    /// # Errors
    /// Where the picture to be made has no room.
    pub(crate) fn start(&self, prompt: &Input, max_new_tokens: usize) -> Result<Progress<'_>> {
        let left = if self.modality == OutputModality::Text { None } else { self.begun(prompt)? };
        let needed = match (left, self.modality) {
            (Some(left), _) => left + 1,
            (None, OutputModality::Image) => self.image_tokens + 2,
            (None, _) => 0,
        };
        ensure!(needed <= max_new_tokens, InferError::NoRoomForPicture { needed, room: max_new_tokens });
        Ok(Progress { constraint: self, left, finished: false })
    }

    /// How many image tokens are left of a picture that the prompt begins and does not end.
    fn begun(&self, prompt: &Input) -> Result<Option<usize>> {
        let ids = Vec::<i64>::try_from(prompt.input_ids.view([-1]))?;
        let places: HashSet<i64> = prompt.spans.image_positions().into_iter().collect();
        let is_place = |i: usize| places.contains(&(i as i64));
        let image_token_ids = self.model.image_vocabulary();
        let is_image = |i: usize| is_place(i) || image_token_ids.binary_search(&ids[i]).is_ok();
        let there = (0..ids.len()).rev().take_while(|&i| is_image(i)).count();
        let before = (ids.len() - there).checked_sub(1);
        let begun = before.is_some_and(|i| ids[i] == self.model.begin_image_id());
        Ok(begun.then(|| self.image_tokens.saturating_sub(there)))
    }
}

/// How far a generation under a [`Constraint`] has come.
#[derive(Debug)]
pub(crate) struct Progress<'a> {
    constraint: &'a Constraint<'a>,
    left: Option<usize>, // image tokens left of the picture it is in
    finished: bool,
}

impl Progress<'_> {
    /// The next token for the `logits` of all tokens, where `room` tokens fit, this one among them.
    pub(crate) fn choose(&mut self, logits: &mut [f32], room: usize, sampler: &mut Sampler) -> i64 {
        let allowed = self.allowed(room);
        let token = if let Allowed::Only(token) = allowed {
            sampler.saw(token);
            token
        } else {
            for (logit, &is_image) in logits.iter_mut().zip(&self.constraint.is_image) {
                if is_image != (allowed == Allowed::ImageTokens) {
                    *logit = f32::NEG_INFINITY;
                }
            }
            if allowed == Allowed::WordsAlone
                && let Some(begin) = logits.get_mut(self.constraint.model.begin_image_id() as usize)
            {
                *begin = f32::NEG_INFINITY;
            }
            sampler.choose(logits)
        };
        self.advance(token);
        token
    }

    /// Whether the picture that was asked for is complete.
    pub(crate) fn is_finished(&self) -> bool {
        self.finished
    }

    fn allowed(&self, room: usize) -> Allowed {
        let constraint = self.constraint;
        match (self.left, constraint.modality) {
            (Some(0), _) => Allowed::Only(constraint.model.end_image_id()),
            (Some(_), _) => Allowed::ImageTokens,
            (None, OutputModality::Image) => Allowed::Only(constraint.model.begin_image_id()),
            (None, OutputModality::Interleaved) if room < constraint.image_tokens + 2 => Allowed::WordsAlone,
            (None, _) => Allowed::Words,
        }
    }

    fn advance(&mut self, token: i64) {
        let constraint = self.constraint;
        self.left = match self.left {
            Some(0) => {
                self.finished = constraint.modality == OutputModality::Image;
                None
            }
            Some(left) => Some(left - 1),
            None => (token == constraint.model.begin_image_id() && constraint.modality != OutputModality::Text)
                .then_some(constraint.image_tokens),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    use fixtures::Golden;
    use tch::{Device, Kind, Tensor};
    use vora_llm::LlmConfig;
    use vora_model::{Chameleon, VisionLanguageModel};
    use vora_text::{Span, Spans};
    use vora_torch::weights::Weights;
    use vora_vision::VqModel;

    use crate::{FinishReason, Generated, Passage, SamplingParams, generate, generate_within, passages};

    const IMAGE_TOKENS: usize = 16;

    /// The golden Chameleon, and a decoder of random weights that Hugging Face's lacks.
    fn model(golden: &Golden, name: &str) -> Chameleon {
        let text = std::fs::read(fixtures::root().join("golden/chameleon.json")).unwrap();
        let config = serde_json::from_slice::<BTreeMap<String, LlmConfig>>(&text).unwrap().remove(name).unwrap();
        let vq_config = serde_json::from_value(config.extra["vq_config"].clone()).unwrap();
        let random = Weights::random(2, Device::Cpu, Kind::Float);
        let decoder = VqModel::load(&vq_config, &random).unwrap().tensors().into_iter();
        let decoder = decoder.filter(|(name, _)| name.starts_with("decoder."));
        let tensors = decoder.map(|(name, t)| (format!("model.vqmodel.{name}"), t)).chain(golden.under("weights."));
        Chameleon::load(&config, &Weights::from_tensors(tensors, Device::Cpu, Kind::Float)).unwrap()
    }

    fn input(ids: &[i64]) -> Input {
        let spans = Spans::text(&[ids.len() as i64]);
        Input::new(Tensor::from_slice(ids).unsqueeze(0), Vec::new(), spans)
    }

    /// So hot that image tokens, half of the vocabulary, would come everywhere.
    fn sampled(seed: u64) -> SamplingParams {
        SamplingParams { temperature: 3.0, seed, ..SamplingParams::default() }
    }

    fn run(constraint: &Constraint<'_>, prompt: &[i64], params: &SamplingParams, max: usize) -> Generated {
        generate_within(constraint, &input(prompt), params, &[2], max, |_| true).unwrap()
    }

    fn count(model: &Chameleon, ids: &[i64]) -> usize {
        ids.iter().filter(|id| model.image_vocabulary().contains(id)).count()
    }

    #[test]
    fn text_is_what_the_reference_writes() {
        let golden = fixtures::open("chameleon");
        for name in ["pre", "swin"] {
            let model = model(&golden, name);
            let constraint = Constraint::new(OutputModality::Text, &model);
            for (row, before) in [(0, 4), (1, 2)] {
                let prompt = Input::new(
                    golden["input_ids"].narrow(0, row, 1),
                    vec![golden["pixel_values"].get(row)],
                    Spans::new(vec![vec![Span::text(before), Span::image(4, 4), Span::text(10 - before)]]),
                );
                let expected = Vec::<i64>::try_from(golden[&format!("{name}.generated")].get(row)).unwrap();
                let found = generate_within(&constraint, &prompt, &SamplingParams::default(), &[], 8, |_| true);
                assert_eq!(found.unwrap().ids, expected, "{name}, row {row}");
            }
            // What the mask leaves out is what the reference puts to the lowest number.
            let forbidden = golden[&format!("{name}.text_logits")].get(0).get(0).eq(f64::from(f32::MIN));
            assert_eq!(Vec::<bool>::try_from(forbidden).unwrap(), constraint.is_image);
        }
    }

    #[test]
    fn text_has_no_image_token_where_free_logits_would_give_them() {
        let model = model(&fixtures::open("chameleon"), "pre");
        let constraint = Constraint::new(OutputModality::Text, &model);
        let begins = [14, model.begin_image_id()]; // a begin changes nothing for words
        let image_token_ids = Tensor::from_slice(model.image_vocabulary());
        for prompt in [&[14, 46][..], &begins] {
            let output = tch::no_grad(|| model.forward(&input(prompt), 0)).unwrap();
            let logits = model.llm().logits(&output.last_hidden_state.get(0).get(-1)); // [vocab]
            let free = logits.softmax(-1, Kind::Float).index_select(0, &image_token_ids).sum(Kind::Float);
            assert!(free.double_value(&[]) > 0.2, "{free:?}");
            for seed in 0..6 {
                let generated = run(&constraint, prompt, &sampled(seed), 40);
                assert_eq!(count(&model, &generated.ids), 0, "{:?}", generated.ids);
                let plain = generate(&model, &input(prompt), &sampled(seed), &[2], 40, |_| true).unwrap();
                assert_eq!(plain.ids, generated.ids);
            }
        }
    }

    #[test]
    fn an_image_is_its_tokens_between_begin_and_end() {
        let model = model(&fixtures::open("chameleon"), "pre");
        let constraint = Constraint::new(OutputModality::Image, &model);
        for params in [SamplingParams::default(), sampled(1), sampled(2)] {
            let generated = run(&constraint, &[14, 46], &params, 40);
            assert_eq!(generated.finish_reason, FinishReason::Stop);
            let [begin, tokens @ .., end] = generated.ids.as_slice() else { panic!("{generated:?}") };
            assert_eq!((*begin, *end), (model.begin_image_id(), model.end_image_id()));
            assert_eq!((tokens.len(), count(&model, tokens)), (IMAGE_TOKENS, IMAGE_TOKENS));
            let found = passages(&model, &generated.ids).unwrap();
            let [Passage::Image(picture)] = found.as_slice() else { panic!("{found:?}") };
            assert_eq!(picture.dimensions(), (8, 8));
            assert_eq!(*picture, model.draw(&Tensor::from_slice(tokens).view([1, -1])).unwrap()[0]);
        }
        // Where the prompt has begun it, the rest.
        let image_token = model.image_vocabulary()[3];
        for (prompt, there) in [(vec![14, model.begin_image_id()], 0), (vec![model.begin_image_id(), image_token], 1)] {
            let generated = run(&constraint, &prompt, &sampled(3), 40);
            assert_eq!(count(&model, &generated.ids), IMAGE_TOKENS - there);
            assert_eq!(generated.ids.len(), IMAGE_TOKENS - there + 1);
        }
        let little = |max| generate_within(&constraint, &input(&[14]), &sampled(0), &[], max, |_| true);
        assert_eq!(little(18).unwrap().ids.len(), 18);
        let error = little(17).unwrap_err().to_string();
        assert_eq!(error, "the picture takes 18 tokens, max_new_tokens and the model's context leave 17");
    }

    #[test]
    fn interleaved_pictures_are_whole_and_stand_alone() {
        let model = model(&fixtures::open("chameleon"), "pre");
        let constraint = Constraint::new(OutputModality::Interleaved, &model);
        let (mut pictures, mut words) = (0, 0);
        for seed in 0..12 {
            let ids = generate_within(&constraint, &input(&[14]), &sampled(seed), &[], 60, |_| true).unwrap().ids;
            for (i, run) in ids.split(|&id| id == model.begin_image_id()).enumerate() {
                let within = if i == 0 { 0 } else { IMAGE_TOKENS };
                assert!(run.len() >= within && count(&model, &run[..within]) == within, "{ids:?}");
                assert!(within == 0 || run[within] == model.end_image_id(), "{ids:?}");
                assert_eq!(count(&model, &run[within..]), 0, "{ids:?}");
            }
            for passage in passages(&model, &ids).unwrap() {
                match passage {
                    Passage::Image(_) => pictures += 1,
                    Passage::Text(ids) => words += ids.len(),
                }
            }
        }
        assert!(pictures >= 4 && words >= 100, "{pictures} pictures, {words} words");
        // A picture of the prompt that lacks its end gets that first.
        let places = Spans::new(vec![vec![Span::text(2), Span::image(4, 4)]]);
        let prompt = [[14, model.begin_image_id()].as_slice(), &[0; IMAGE_TOKENS]].concat();
        let pixel_values = vec![Tensor::zeros([3, 8, 8], (Kind::Float, Device::Cpu))];
        let prompt = Input::new(input(&prompt).input_ids, pixel_values, places);
        let generated = generate_within(&constraint, &prompt, &sampled(0), &[], 3, |_| true).unwrap();
        assert_eq!(generated.ids[0], model.end_image_id());
    }

    #[test]
    fn a_picture_is_begun_where_it_just_fits() {
        let model = model(&fixtures::open("chameleon"), "pre");
        let constraint = Constraint::new(OutputModality::Interleaved, &model);
        let mut logits = [0.0; 48];
        logits[model.begin_image_id() as usize] = 9.0;
        for (room, begins) in [(IMAGE_TOKENS + 1, false), (IMAGE_TOKENS + 2, true)] {
            let mut progress = constraint.start(&input(&[14]), room).unwrap();
            let mut sampler = Sampler::new(SamplingParams::default(), &[]).unwrap();
            let token = progress.choose(&mut logits.clone(), room, &mut sampler);
            assert_eq!(token == model.begin_image_id(), begins, "room for {room}");
        }
    }

    #[test]
    fn tokens_that_nobody_chose_count_as_seen() {
        let model = model(&fixtures::open("chameleon"), "pre");
        let constraint = Constraint::new(OutputModality::Image, &model);
        let mut progress = constraint.start(&input(&[14]), 40).unwrap();
        let params = SamplingParams { repetition_penalty: 2.0, ..SamplingParams::default() };
        let mut sampler = Sampler::new(params, &[]).unwrap();
        let begin = progress.choose(&mut [1.0; 48], 40, &mut sampler);
        assert_eq!(begin, model.begin_image_id());
        let mut logits = [1.0; 48];
        logits[begin as usize] = 1.5;
        assert_ne!(sampler.choose(&mut logits), begin);
    }

    #[test]
    fn the_cache_changes_no_token() {
        let golden = fixtures::open("chameleon");
        for name in ["pre", "swin"] {
            let model = model(&golden, name);
            for modality in [OutputModality::Text, OutputModality::Image, OutputModality::Interleaved] {
                let constraint = Constraint::new(modality, &model);
                for params in [SamplingParams::default(), sampled(5)] {
                    let prompt = vec![14, 46, 42];
                    let cached = generate_within(&constraint, &input(&prompt), &params, &[], 30, |_| true).unwrap();
                    let mut sampler = Sampler::new(params.clone(), &prompt).unwrap();
                    let mut progress = constraint.start(&input(&prompt), 30).unwrap();
                    let mut ids = prompt.clone();
                    while ids.len() < 33 && !progress.is_finished() {
                        let output = tch::no_grad(|| model.forward(&input(&ids), 0)).unwrap();
                        let logits = model.llm().logits(&output.last_hidden_state.select(1, -1)).get(0);
                        let mut logits = Vec::<f32>::try_from(logits).unwrap();
                        ids.push(progress.choose(&mut logits, 33 - ids.len(), &mut sampler));
                    }
                    assert_eq!(cached.ids, ids[3..], "{name} {modality:?} {params:?}");
                }
            }
        }
    }

    #[test]
    fn half_a_picture_is_told() {
        let model = model(&fixtures::open("chameleon"), "pre");
        let token = model.image_vocabulary()[0];
        let error = passages(&model, &[14, model.begin_image_id(), token, token]).unwrap_err().to_string();
        assert_eq!(error, "a picture has 2 image tokens, it takes 16");
        assert_eq!(passages(&model, &[14, model.end_image_id(), 9]).unwrap(), [Passage::Text(vec![14, 9])]);
        assert!(passages(&model, &[]).unwrap().is_empty());
    }
}
