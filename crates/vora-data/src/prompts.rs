//! Questions of a batch as they are asked: each a sample of its own that ends where its answer begins.

use vora_text::{Modality, Span};

use crate::batch::{Batch, SampleInfo};
use crate::sample::{IGNORE_INDEX, QuestionSpan, Sample};

impl Batch {
    /// Every question that is `wanted`, in the order of [`Batch::questions`], with what its answer would follow: the
    /// pictures and the words up to it, those of other questions' branches left out.
    pub fn prompts(&self, wanted: impl Fn(&QuestionSpan) -> bool) -> Vec<Sample> {
        let mut prompts = Vec::new();
        let mut first_image = 0;
        for sample in &self.samples {
            for question in sample.questions.iter().filter(|question| wanted(question)) {
                prompts.push(self.prompt(sample, question, first_image));
            }
            first_image += sample.num_images;
        }
        prompts
    }

    fn prompt(&self, sample: &SampleInfo, question: &QuestionSpan, first_image: usize) -> Sample {
        let end = question.tokens.start + 1; // the token that predicts the answer's first one is the last
        let row = &self.input_ids[sample.row * self.seq as usize..];
        let mut start = 0;
        let placed = self.spans.rows()[sample.row].iter().map(|span| {
            let placed = (start, span);
            start += span.len() as usize;
            placed
        });
        let is_own = |(start, span): &(usize, &Span)| {
            span.document().is_none() || (sample.tokens.start..sample.tokens.end.min(end)).contains(start)
        };
        let own: Vec<(usize, &Span)> = placed.filter(is_own).collect();
        let branch = own.last().and_then(|(_, span)| span.branch());
        let (mut input_ids, mut spans) = (Vec::new(), Vec::new());
        for (start, span) in own.into_iter().filter(|(_, span)| span.branch().is_none() || span.branch() == branch) {
            let len = (span.len() as usize).min(end - start);
            input_ids.extend_from_slice(&row[start..start + len]);
            spans.push(match span.modality() {
                Modality::Text => Span::text(len as i64),
                Modality::Image { rows, cols } => Span::image(rows, cols),
            });
        }
        let num_images = spans.iter().filter(|span| span.is_image()).count();
        Sample {
            id: sample.id.clone(),
            targets: vec![IGNORE_INDEX; input_ids.len()],
            input_ids,
            spans,
            images: self.images[first_image..first_image + num_images].to_vec(),
            questions: Vec::new(),
            cut_answers: 0,
            notes: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::batch::{collate, collate_rows, collate_sharing};
    use crate::maker;
    use crate::scenes::{Scenes, ScenesConfig, Split};
    use crate::sources::{SceneSource, Source};

    /// What a prompt reads like, `#` for each patch.
    fn read(maker: &maker::SampleMaker, prompt: &Sample) -> String {
        let mut ids = prompt.input_ids.iter();
        let span = |span: &Span| {
            let ids: Vec<i64> = ids.by_ref().take(span.len() as usize).copied().collect();
            let words = || maker.preparation().tokenizer.decode(&ids, false).unwrap();
            if span.is_image() { "#".repeat(ids.len()) } else { words() }
        };
        prompt.spans.iter().map(span).collect()
    }

    #[test]
    fn a_question_of_several_is_asked_as_if_alone() {
        let maker = Arc::new(maker::tests::tiny());
        let scenes = Scenes::new(ScenesConfig::default(), Split::Test).unwrap();
        let source = SceneSource::new(scenes, maker.clone());
        let samples = || (0..4).map(|index| source.sample(index).unwrap()).collect::<Vec<_>>();
        let rows = collate_rows(samples().into_iter().map(|sample| vec![sample]).collect(), 0);
        let sharing = collate_sharing(samples(), 0);
        assert!(sharing.spans.rows()[0][0].document().is_none());
        let [a, b, c, d] = samples().try_into().unwrap();
        for batch in [rows, sharing, collate_rows(vec![vec![a, b, c], vec![d]], 0)] {
            let asked: Vec<_> = batch.samples.iter().flat_map(|s| s.questions.iter().map(move |q| (s, q))).collect();
            let prompts = batch.prompts(|_| true);
            assert_eq!(prompts.len(), asked.len());
            for (prompt, (sample, question)) in prompts.iter().zip(asked) {
                let says = format!("<|im_start|>user\n####\n{}<|im_end|>\n<|im_start|>assistant\n", question.question);
                assert_eq!(read(&maker, prompt), says);
                assert_eq!((&prompt.id, prompt.images.len()), (&sample.id, 1));
                let index = sample.id.strip_prefix("test-").unwrap().parse().unwrap();
                assert_eq!(prompt.images, source.sample(index).unwrap().images);
            }
            let few = batch.prompts(|question| question.kind == "where");
            assert!(!few.is_empty() && few.len() < prompts.len());
        }
    }

    #[test]
    fn later_turns_and_their_pictures_are_not_there_yet() {
        let image = vora_image::Pixels { data: vec![0.0; 3], height: 1, width: 1 };
        let turn = |tokens| QuestionSpan {
            kind: "turn".to_owned(),
            question: String::new(),
            answer: String::new(),
            tokens,
            is_rejected: false,
        };
        let sample = Sample {
            id: "r".to_owned(),
            input_ids: (1..=8).collect(),
            targets: vec![IGNORE_INDEX; 8],
            spans: vec![Span::text(1), Span::image(1, 1), Span::text(3), Span::image(1, 1), Span::text(2)],
            images: vec![image.clone(), vora_image::Pixels { data: vec![1.0; 3], ..image.clone() }],
            questions: vec![turn(2..4), turn(6..8)],
            cut_answers: 0,
            notes: Vec::new(),
        };
        let prompts = collate(vec![sample.clone()], 0).prompts(|_| true);
        assert_eq!((&prompts[0].input_ids[..], &prompts[0].images[..]), (&[1, 2, 3][..], &[image][..]));
        assert_eq!(prompts[0].spans, [Span::text(1), Span::image(1, 1), Span::text(1)]);
        assert_eq!((prompts[1].input_ids.len(), &prompts[1].images), (7, &sample.images));
    }
}
