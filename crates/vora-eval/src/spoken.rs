//! Descriptions and boxes, judged by what the model says: teacher forcing knows only the answer that is written down, and
//! many are right.

use anyhow::{Result, ensure};
use vora_data::{Batch, QuestionSpan, collate};

use crate::scores::{has_many_right, is_right};

/// Tokens that an answer may have beyond the right one's before it is cut off, and wrong.
const MORE_TOKENS: usize = 16;

/// For each question of the batch whether it is answered right, where it asks for a description or a box; none for the others.
/// `say` is given the prompts, a row each, and how many tokens may follow them at most: it says what does, or none where
/// that has no end.
///
/// # Errors
/// Those of `say`.
pub fn spoken(
    batch: &Batch,
    say: impl FnOnce(&Batch, usize) -> Result<Vec<Option<String>>>,
) -> Result<Vec<Option<bool>>> {
    let is_asked = |question: &QuestionSpan| has_many_right(&question.kind);
    let questions = || batch.questions().map(|(question, _)| question);
    let Some(longest) = questions().filter(|q| is_asked(q)).map(|q| q.tokens.len()).max() else {
        return Ok(questions().map(|_| None).collect());
    };
    let prompts = collate(batch.prompts(is_asked), 0);
    let said = say(&prompts, longest + MORE_TOKENS)?;
    ensure!(
        said.len() == prompts.spans.rows().len(),
        "{} answers to {} prompts",
        said.len(),
        prompts.spans.rows().len()
    );
    let mut said = said.into_iter();
    let mut is_said = |question: &QuestionSpan| {
        let (said, expected) = (said.next().flatten(), std::slice::from_ref(&question.answer));
        said.is_some_and(|said| is_right(Some(&question.kind), &said, expected))
    };
    Ok(questions().map(|question| is_asked(question).then(|| is_said(question))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use vora_data::Sample;
    use vora_image::Pixels;
    use vora_text::Span;

    /// A picture with a question of each of these types, whose answers are two tokens long.
    fn sample(kinds: &[&str], answer: &str) -> Sample {
        let branch = |idx: usize| Span::text(3).on_branch(idx as i64);
        let question = |(idx, kind): (usize, &&str)| QuestionSpan {
            kind: (*kind).to_owned(),
            question: String::new(),
            answer: answer.to_owned(),
            tokens: 2 + 3 * idx..4 + 3 * idx,
            is_rejected: false,
        };
        Sample {
            id: String::new(),
            input_ids: (0..1 + 3 * kinds.len() as i64).collect(),
            targets: vec![vora_data::IGNORE_INDEX; 1 + 3 * kinds.len()],
            spans: [Span::image(1, 1)].into_iter().chain((0..kinds.len()).map(branch)).collect(),
            images: vec![Pixels { data: vec![0.0; 3], height: 1, width: 1 }],
            questions: kinds.iter().enumerate().map(question).collect(),
            cut_answers: 0,
            notes: Vec::new(),
        }
    }

    #[test]
    fn a_box_is_said_and_need_not_be_the_same() {
        let batch = collate(vec![sample(&["box", "colour", "box"], "<box>(0,0),(1000,1000)</box>")], 0);
        let said = ["<box>(0,0),(990,980)</box>", "<box>(0,0),(490,980)</box>"];
        let found = spoken(&batch, |_, _| Ok(said.map(|said| Some(said.to_owned())).into())).unwrap();
        assert_eq!(found, [Some(true), None, Some(false)]);
    }

    #[test]
    fn only_descriptions_are_said_and_their_order_is_free() {
        let right = "The picture shows a red ring at the top left and a cross at the bottom right.";
        let samples = [&["where", "describe"][..], &["describe", "describe"], &["describe", "colour"]];
        let batch = collate(samples.map(|kinds| sample(kinds, right)).into(), 0);
        let sentences = [
            Some(right),
            Some("The picture shows a cross at the bottom right and a red ring at the top left."),
            Some("The picture shows a blue ring at the top left and a cross at the bottom right."),
            None,
        ];
        let say = |prompts: &Batch, most: usize| {
            // The picture and what is on the question's own branch up to the answer.
            assert_eq!((&prompts.input_ids[..], most), (&[0, 4, 5, 0, 1, 2, 0, 4, 5, 0, 1, 2][..], 2 + MORE_TOKENS));
            Ok(sentences.map(|said| said.map(str::to_owned)).into())
        };
        let found = spoken(&batch, say).unwrap();
        assert_eq!(found, [None, Some(true), Some(true), Some(false), Some(false), None]);
        let none = spoken(&collate(vec![sample(&["where"], right)], 0), |_, _| panic!("nothing is asked")).unwrap();
        assert_eq!(none, [None]);
    }
}
