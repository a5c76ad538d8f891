//! Records and scenes as samples of one model.

use std::borrow::Cow;

use anyhow::{Context, Result, ensure};
use rayon::iter::{IntoParallelIterator, ParallelIterator};
use vora_image::{Pixels, RgbImage};
use vora_text::{Message, Part, Piece, Span};

use crate::error::{DataError, TooLong};
use crate::preparation::Preparation;
use crate::records::{Entry, Record, shown};
use crate::sample::{IGNORE_INDEX, QuestionSpan, Sample};
use crate::scenes::Question;
use crate::tokens::Tokens;

/// What is noted of a preference where answers are learned.
const NOT_REJECTED: &str = "it has a rejected answer, which is not read: only `loss: dpo` learns from it";

/// Makes samples for one model.
#[derive(Debug)]
pub struct SampleMaker {
    preparation: Preparation,
    makes_pairs: bool,
}

/// A branch to be: a conversation with its last answer, in tokens and in words.
struct Asked {
    chat: Tokens,
    kind: &'static str,
    question: String,
    answer: String,
    is_rejected: bool,
}

impl SampleMaker {
    /// Makes samples by `preparation`.
    pub fn new(preparation: Preparation) -> Self {
        Self { preparation, makes_pairs: false }
    }

    /// Makes samples of preferences by `preparation`: what comes before the last answer is the trunk, and the chosen answer
    /// and the rejected one are a branch each, in this order.
    pub fn of_pairs(preparation: Preparation) -> Self {
        Self { preparation, makes_pairs: true }
    }

    /// Whether its samples are preferences.
    pub fn makes_pairs(&self) -> bool {
        self.makes_pairs
    }

    /// How words and pictures are prepared.
    pub fn preparation(&self) -> &Preparation {
        &self.preparation
    }

    /// A conversation; the loss is on what the assistant says. Where it is too long, turns are left out at its end. Of a
    /// preference the chosen answer is learned, as a note says; [`SampleMaker::of_pairs`] makes a pair of it.
    ///
    /// # Errors
    /// Where not even the first answer fits, or where images and patches do not go together; where a pair is to be made of
    /// a record without a rejected answer.
    pub fn conversation(&self, record: &Record, images: &[RgbImage]) -> Result<Sample> {
        self.decoded_conversation(record, images.len(), |idx| Ok(Cow::Borrowed(&images[idx])))
    }

    /// The same, of pictures that are decoded by rayon's threads: no more than there are threads are in memory at their
    /// full size.
    pub(crate) fn decoded_conversation<'a>(
        &self,
        record: &Record,
        count: usize,
        decode: impl Fn(usize) -> Result<Cow<'a, RgbImage>> + Sync,
    ) -> Result<Sample> {
        let pixels = |idx| self.pixels(idx, &*decode(idx)?);
        let images: Vec<_> = match count {
            0 | 1 => (0..count).map(pixels).collect(),
            _ => (0..count).into_par_iter().map(pixels).collect(),
        };
        // Of several bad ones the first is told, whichever was decoded first.
        let images = images.into_iter().collect::<Result<Vec<_>>>()?;
        let sample = || {
            if self.makes_pairs {
                return self.pair(record, images);
            }
            let mut images = images;
            let mut messages = record.messages.clone();
            let mut tokens = self.tokens(&messages, &images)?;
            let ends: Vec<_> = tokens.answers().map(|answer| answer.end).collect();
            let fitting = ends.iter().take_while(|end| **end - 1 <= self.preparation.max_length).count();
            let first_end = *ends.first().context("the chat template shows no answer")?;
            ensure!(fitting > 0, TooLong { tokens: first_end - 1, max_length: self.preparation.max_length });
            if fitting < ends.len() {
                let keep =
                    messages.iter().enumerate().filter(|(_, message)| message.role == "assistant").nth(fitting - 1);
                messages.truncate(1 + keep.context("the template makes answers of its own")?.0);
                images.truncate(num_images(&messages));
                tokens = self.tokens(&messages, &images)?;
            }
            let mut sample = Sample { cut_answers: ends.len() - fitting, ..tokens.into_sample(record, images)? };
            sample.notes.extend(self.beyond_context(sample.input_ids.len()));
            sample.notes.extend(record.rejected.as_ref().map(|_| NOT_REJECTED.to_owned()));
            Ok(sample)
        };
        sample().with_context(|| format!("sample {}", record.id))
    }

    /// Both answers of a preference after what they answer.
    fn pair(&self, record: &Record, images: Vec<Pixels>) -> Result<Sample> {
        let rejected = record.rejected.as_ref().ok_or(DataError::NoRejected)?;
        let (chosen, prompt) = record.messages.split_last().context("it has no conversation")?;
        let asked = |answer: &Message, is_rejected| {
            let chat = self.tokens(&[prompt, std::slice::from_ref(answer)].concat(), &images)?;
            let question = prompt.last().map(shown).unwrap_or_default();
            anyhow::Ok(Asked { chat, kind: "turn", question, answer: shown(answer), is_rejected })
        };
        let branches = [asked(chosen, false)?, asked(rejected, true)?];
        let mut sample = Sample { id: record.id.clone(), ..self.pack(&branches, images)? };
        sample.notes.splice(0..0, record.notes.iter().cloned());
        Ok(sample)
    }

    /// A record of a shard, whose images came with it.
    pub(crate) fn entry(&self, entry: &Entry) -> Result<Sample> {
        let decode = |idx: usize| {
            let image = vora_image::decode_image(&entry.images[idx]);
            image.map(Cow::Owned).with_context(|| format!("image {idx}"))
        };
        let sample = self.decoded_conversation(&entry.record, entry.images.len(), decode);
        sample.with_context(|| entry.place.clone())
    }

    /// Questions about one picture, packed: the picture and what all questions begin with is the trunk, the rest of
    /// each, with its answer, a branch after it. Trunk and branch together are the tokens of a chat with that one
    /// question, so a model that is asked it alone reads the same.
    ///
    /// # Errors
    /// Where it is too long, or where the picture does not come before what is different.
    pub fn packed(&self, id: String, picture: &RgbImage, questions: Vec<Question>) -> Result<Sample> {
        let asked = questions.into_iter().map(|question| (question, None));
        self.packed_with(id, picture, asked.collect())
    }

    /// The same with a second branch to each question, its answer rejected in favour of the question's own.
    ///
    /// # Errors
    /// As [`SampleMaker::packed`].
    pub fn packed_pairs(&self, id: String, picture: &RgbImage, pairs: Vec<(Question, String)>) -> Result<Sample> {
        self.packed_with(id, picture, pairs.into_iter().map(|(question, wrong)| (question, Some(wrong))).collect())
    }

    fn packed_with(&self, id: String, picture: &RgbImage, asked: Vec<(Question, Option<String>)>) -> Result<Sample> {
        let sample = || {
            ensure!(!asked.is_empty(), "it has no questions");
            let images = vec![self.pixels(0, picture)?];
            let answers = asked.iter().flat_map(|(question, wrong)| {
                let wrong = wrong.iter().map(move |wrong| (question, wrong, true));
                std::iter::once((question, &question.answer, false)).chain(wrong)
            });
            let branches = answers.map(|(asked, answer, is_rejected)| {
                let messages = [Message::question_about(1, &asked.question), Message::new("assistant", answer)];
                let chat = self.tokens(&messages, &images)?;
                let (kind, question) = (asked.kind.name(), asked.question.clone());
                anyhow::Ok(Asked { chat, kind, question, answer: answer.clone(), is_rejected })
            });
            let branches = branches.collect::<Result<Vec<_>>>()?;
            self.pack(&branches, images)
        };
        Ok(Sample { id: id.clone(), ..sample().with_context(|| format!("sample {id}"))? })
    }

    fn pack(&self, branches: &[Asked], images: Vec<Pixels>) -> Result<Sample> {
        let trunk_len = trunk_len(branches)?;
        let trunk = &branches[0].chat;
        let mut sample = Sample {
            id: String::new(),
            input_ids: trunk.ids[..trunk_len].to_vec(),
            targets: vec![IGNORE_INDEX; trunk_len],
            spans: trunk.trunk(trunk_len)?,
            images,
            questions: Vec::with_capacity(branches.len()),
            cut_answers: 0,
            notes: Vec::new(),
        };
        for (branch, Asked { chat, kind, question, answer: said, is_rejected }) in branches.iter().enumerate() {
            let answer = chat.last_answer()?;
            // From a token's place in the chat to its place in the row.
            let shift = sample.input_ids.len() - trunk_len;
            let range = trunk_len..answer.end - 1;
            let target = |place| if place + 1 < answer.start { IGNORE_INDEX } else { chat.target(place) };
            sample.targets.extend(range.clone().map(target));
            sample.spans.push(Span::text(range.len() as i64).on_branch(branch as i64));
            sample.input_ids.extend(&chat.ids[range]);
            sample.questions.push(QuestionSpan {
                kind: (*kind).to_owned(),
                question: question.clone(),
                answer: said.clone(),
                tokens: answer.start - 1 + shift..answer.end - 1 + shift,
                is_rejected: *is_rejected,
            });
        }
        let len = sample.input_ids.len();
        ensure!(len <= self.preparation.max_length, TooLong { tokens: len, max_length: self.preparation.max_length });
        // A branch goes on where the trunk ends.
        let longest = branches.iter().filter_map(|Asked { chat, .. }| Some(chat.last_answer().ok()?.end - 1)).max();
        sample.notes.extend(longest.and_then(|longest| self.beyond_context(longest)));
        Ok(sample)
    }

    /// What is noted of a conversation of so many tokens, where the model was made for fewer.
    fn beyond_context(&self, tokens: usize) -> Option<String> {
        let context = self.preparation.max_positions;
        (tokens > context).then(|| {
            format!(
                "it has more tokens than the {context} that the LLM was made for (its max_position_embeddings), which \
                 data_preprocess.max_seq_len keeps samples within"
            )
        })
    }

    fn pixels(&self, idx: usize, image: &RgbImage) -> Result<Pixels> {
        let pixels = self.preparation.processor.preprocess(image).with_context(|| format!("image {idx}"))?;
        ensure!(
            pixels.height % self.preparation.patch_size == 0 && pixels.width % self.preparation.patch_size == 0,
            "image {idx} has {} x {} pixels once processed, which is no whole number of patches of {}",
            pixels.width,
            pixels.height,
            self.preparation.patch_size
        );
        Ok(pixels)
    }

    fn tokens(&self, messages: &[Message], images: &[Pixels]) -> Result<Tokens> {
        let mut images = images.iter();
        let mut tokens = Tokens::default();
        for piece in self.preparation.chat.encode_chat(&self.preparation.tokenizer, messages)? {
            match piece {
                Piece::Text { ids, supervised } => tokens.add_text(&ids, supervised),
                Piece::Image => {
                    let image = images.next().context("more places than images")?;
                    let (rows, cols) =
                        (image.height / self.preparation.patch_size, image.width / self.preparation.patch_size);
                    let (begin, end) = self.preparation.image_marks.unzip();
                    tokens.add_text(begin.as_slice(), false);
                    tokens.add_image(rows, cols);
                    tokens.add_text(end.as_slice(), false);
                }
            }
        }
        ensure!(images.next().is_none(), "the chat template leaves an image out");
        Ok(tokens)
    }
}

fn num_images(messages: &[Message]) -> usize {
    messages.iter().flat_map(|message| &message.content).filter(|part| **part == Part::Image).count()
}

/// How many tokens all chats begin with. The token that predicts an answer's first one is not among them: it has
/// another target on each branch.
fn trunk_len(branches: &[Asked]) -> Result<usize> {
    let first = &branches[0].chat.ids;
    let mut len = first.len();
    for Asked { chat, .. } in branches {
        let common = first.iter().zip(&chat.ids).take_while(|(a, b)| a == b).count();
        let answer = chat.last_answer()?;
        len = len.min(common).min(answer.start - 1);
    }
    Ok(len)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::ops::Range;
    use std::sync::Arc;

    use image::Rgb;
    use vora_text::{ChatTemplate, Modality};

    use super::*;
    use crate::preparation;
    use crate::records::RecordKeys;
    use crate::scenes::QuestionKind;

    /// Makes samples by the tiny preparation.
    pub(crate) fn tiny() -> SampleMaker {
        SampleMaker::new(preparation::tests::tiny())
    }

    fn picture() -> RgbImage {
        RgbImage::from_pixel(20, 10, Rgb([200, 30, 30]))
    }

    fn record(turns: &[&str], frames: usize) -> Record {
        let turn = |(idx, text): (usize, &&str)| serde_json::json!({"from": if idx % 2 == 0 { "human" } else { "gpt" }, "value": text});
        let turns: Vec<_> = turns.iter().enumerate().map(turn).collect();
        let line = serde_json::json!({"id": "r", "frames": vec!["a.png"; frames], "conversations": turns});
        Record::parse(line.to_string().as_bytes(), &RecordKeys::default()).unwrap()
    }

    fn question(question: &str, answer: &str) -> Question {
        Question { kind: QuestionKind::Colour, question: question.to_owned(), answer: answer.to_owned() }
    }

    /// What a row reads like, `#` for each patch.
    fn read(maker: &SampleMaker, ids: &[i64], spans: &[Span]) -> String {
        let mut ids = ids.iter();
        let span = |span: &Span| {
            let ids: Vec<_> = ids.by_ref().take(span.len() as usize).copied().collect();
            match span.modality() {
                Modality::Text => maker.preparation.tokenizer.decode(&ids, false).unwrap(),
                Modality::Image { .. } => "#".repeat(ids.len()),
            }
        };
        spans.iter().map(span).collect()
    }

    fn targets(maker: &SampleMaker, sample: &Sample, tokens: Range<usize>) -> String {
        maker.preparation.tokenizer.decode(&sample.targets[tokens], false).unwrap()
    }

    #[test]
    fn only_answers_are_learned() {
        let maker = tiny();
        let turns = ["What is it?\n<image>", "a <b>red</b> one", "And <image>?<|im_end|>", "two"];
        let sample = maker.conversation(&record(&turns, 2), &[picture(), picture()]).unwrap();
        let text = "<|im_start|>user\nWhat is it?\n####<|im_end|>\n<|im_start|>assistant\na <b>red</b> one<|im_end|>\n\
                    <|im_start|>user\nAnd ####?<|im_end|><|im_end|>\n<|im_start|>assistant\ntwo";
        assert_eq!(read(&maker, &sample.input_ids, &sample.spans), text);
        let modalities: Vec<_> = sample.spans.iter().map(|span| span.modality()).collect();
        let image = Modality::Image { rows: 2, cols: 2 };
        assert_eq!(modalities, [Modality::Text, image, Modality::Text, image, Modality::Text]);

        assert_eq!(sample.questions.len(), 2);
        let mut learned = 0;
        for (question, answer) in sample.questions.iter().zip(["a <b>red</b> one", "two"]) {
            assert_eq!(targets(&maker, &sample, question.tokens.clone()), format!("{answer}<|im_end|>"));
            assert_eq!((question.answer.as_str(), question.kind.as_str()), (answer, "turn"));
            learned += question.tokens.len();
        }
        assert_eq!(sample.targets.iter().filter(|target| **target != IGNORE_INDEX).count(), learned);
        // What somebody types is no special token.
        let end = maker.preparation.tokenizer.token_to_id("<|im_end|>").unwrap();
        assert_eq!(sample.input_ids.iter().filter(|id| **id == end).count(), 3);
    }

    #[test]
    fn a_packed_question_reads_as_if_it_were_alone() {
        let maker = tiny();
        let questions =
            [question("What color?", "red"), question("What shape is it?", "a star"), question("Red?", "yes")];
        let packed = maker.packed("p".to_owned(), &picture(), questions.to_vec()).unwrap();
        let trunk: Vec<_> = packed.spans.iter().take_while(|span| span.branch().is_none()).copied().collect();
        let trunk_len = trunk.iter().map(|span| span.len() as usize).sum::<usize>();
        assert_eq!(read(&maker, &packed.input_ids[..trunk_len], &trunk), "<|im_start|>user\n####\n");
        assert_eq!(packed.images.len(), 1);

        let mut start = trunk_len;
        for (branch, (asked, question)) in packed.questions.iter().zip(&questions).enumerate() {
            let span = packed.spans[trunk.len() + branch];
            assert_eq!(span.branch(), Some(branch as i64));
            let end = start + span.len() as usize;
            let record = record(&[&format!("<image>\n{}", question.question), &question.answer], 1);
            let alone = maker.conversation(&record, &[picture()]).unwrap();
            let row = [&packed.input_ids[..trunk_len], &packed.input_ids[start..end]].concat();
            assert_eq!(row, alone.input_ids);
            assert_eq!(packed.targets[start..end], alone.targets[trunk_len..]);
            assert_eq!(asked.tokens.len(), alone.questions[0].tokens.len());
            assert_eq!(targets(&maker, &packed, asked.tokens.clone()), format!("{}<|im_end|>", question.answer));
            assert_eq!((asked.kind.as_str(), &asked.answer), ("colour", &question.answer));
            start = end;
        }
        assert_eq!(start, packed.input_ids.len());
        vora_text::Spans::new(vec![packed.spans]).validate().unwrap();
    }

    #[test]
    fn questions_that_begin_alike_share_it_but_not_the_token_before_the_answer() {
        let maker = tiny();
        let questions = vec![question("What color?", "red"), question("What color?", "blue")];
        let packed = maker.packed("p".to_owned(), &picture(), questions).unwrap();
        let branches: Vec<_> = packed.spans.iter().filter(|span| span.branch().is_some()).collect();
        let row = read(&maker, &packed.input_ids, &packed.spans);
        assert_eq!(
            row, "<|im_start|>user\n####\nWhat color?<|im_end|>\n<|im_start|>assistant\nred\nblue",
            "{branches:?}"
        );
        let alone = maker.packed("p".to_owned(), &picture(), vec![question("What color?", "red")]).unwrap();
        assert_eq!(alone.spans.last().unwrap().branch(), Some(0));
    }

    fn preference(turns: &[&str], rejected: &str, frames: usize) -> Record {
        Record { rejected: Some(Message::new("assistant", rejected)), ..record(turns, frames) }
    }

    /// Each branch of a pair with the trunk is, token by token, what its whole conversation is.
    #[test]
    fn a_pair_reads_as_its_two_conversations() {
        let (maker, alone) = (SampleMaker::of_pairs(preparation::tests::tiny()), tiny());
        for (turns, frames) in [
            (&["<image>\nWhat is it?", "a star"][..], 1),
            (&["What is it?", "a star"], 0),
            (&["<image>What?", "a star", "And <image>?", "a stone"], 2),
        ] {
            let pictures = vec![picture(); frames];
            let pair = maker.conversation(&preference(turns, "a circle", frames), &pictures).unwrap();
            let other = [&turns[..turns.len() - 1], &["a circle"]].concat();
            let wholes = [turns, &other].map(|turns| alone.conversation(&record(turns, frames), &pictures).unwrap());
            assert_eq!((pair.images.len(), pair.questions.len()), (frames, 2));
            let trunk: i64 = pair.spans.iter().filter(|span| span.branch().is_none()).map(Span::len).sum();
            let mut start = trunk as usize;
            for (branch, (whole, asked)) in (0..).zip(wholes.iter().zip(&pair.questions)) {
                let span = pair.spans.iter().find(|span| span.branch() == Some(branch)).unwrap();
                let end = start + span.len() as usize;
                assert_eq!([&pair.input_ids[..trunk as usize], &pair.input_ids[start..end]].concat(), whole.input_ids);
                // Of an earlier answer, which is the prompt's, nothing is learned.
                let last = whole.questions.last().unwrap();
                assert_eq!(pair.targets[asked.tokens.clone()], whole.targets[last.tokens.clone()]);
                assert_eq!(
                    (asked.is_rejected, &asked.answer, &asked.question),
                    (branch == 1, &last.answer, &last.question)
                );
                start = end;
            }
            let learned = pair.targets.iter().filter(|target| **target != IGNORE_INDEX).count();
            assert_eq!(learned, pair.questions.iter().map(|asked| asked.tokens.len()).sum::<usize>());
            assert!(pair.targets[..trunk as usize].iter().all(|target| *target == IGNORE_INDEX));
            let batch = crate::collate(vec![pair.clone(), pair], 0);
            let lens = [0, 1].map(|i| batch.samples[0].questions[i].tokens.len() as i64);
            assert_eq!(batch.pairs(), [lens; 2]);
            batch.spans.validate().unwrap();
        }
    }

    #[test]
    fn the_limit_counts_what_a_row_holds() {
        let with = |length: usize| SampleMaker::new(preparation::tests::tiny().with_max_length(length));
        let make = |length: usize| with(length).conversation(&record(&["What is it?", "a star"], 0), &[]);
        let len = make(200).unwrap().input_ids.len();
        assert_eq!(make(len).unwrap().input_ids.len(), len);
        let error = format!("{:#}", make(len - 1).unwrap_err());
        assert!(
            error.ends_with(&format!("it has {len} tokens up to its first answer, max_seq_len allows {}", len - 1)),
            "{error}"
        );
    }

    #[test]
    fn a_sample_beyond_the_models_context_is_noted() {
        let with = |positions: usize| preparation::tests::tiny().with_max_positions(positions);
        let turns = ["What is it?", "a star"];
        let whole = SampleMaker::new(with(200)).conversation(&record(&turns, 0), &[]).unwrap();
        let len = whole.input_ids.len();
        let said = format!("more tokens than the {} that the LLM was made for", len - 1);
        let noted = |sample: &Sample| sample.notes.iter().filter(|note| note.contains(&said)).count();
        for (positions, expected) in [(len, 0), (len - 1, 1)] {
            let plain = SampleMaker::new(with(positions)).conversation(&record(&turns, 0), &[]).unwrap();
            let pair = SampleMaker::of_pairs(with(positions)).conversation(&preference(&turns, "a", 0), &[]).unwrap();
            assert_eq!((noted(&plain), noted(&pair)), (expected, expected), "{positions}");
        }
        // Questions about one picture share its tokens, and each goes on from there: the longest counts, not the row.
        let asked = || (0..5).map(|_| question("Which colour?", "red")).collect();
        let row = SampleMaker::new(with(200)).packed("row".to_owned(), &picture(), asked()).unwrap();
        let one =
            SampleMaker::new(with(200)).packed("one".to_owned(), &picture(), vec![question("Which colour?", "red")]);
        let longest = one.unwrap().input_ids.len();
        assert!(row.input_ids.len() > longest + 5);
        for (positions, expected) in [(longest, 0), (longest - 1, 1)] {
            let row = SampleMaker::new(with(positions)).packed("row".to_owned(), &picture(), asked()).unwrap();
            assert_eq!(row.notes.len(), expected);
        }
    }

    #[test]
    fn pairs_need_both_answers_and_room_for_them() {
        let maker = SampleMaker::of_pairs(preparation::tests::tiny());
        let error = maker.conversation(&record(&["What?", "a star"], 0), &[]).unwrap_err();
        assert_eq!(format!("{error:#}"), "sample r: it has no `rejected` answer, which `loss: dpo` learns from");
        assert!(matches!(error.downcast_ref(), Some(DataError::NoRejected)));
        let long = preference(&["What?", "a star"], &"a circle ".repeat(200), 0);
        let error = maker.conversation(&long, &[]).unwrap_err();
        assert!(error.downcast_ref::<TooLong>().is_some(), "{error:#}");
        // Where answers are learned, it is the chosen one.
        let plain = tiny().conversation(&preference(&["What?", "a star"], "a circle", 0), &[]).unwrap();
        assert_eq!((plain.questions.len(), plain.questions[0].answer.as_str()), (1, "a star"));
        assert_eq!(plain.notes, [NOT_REJECTED]);
    }

    #[test]
    fn text_alone_has_no_images() {
        let sample = tiny().conversation(&record(&["one", "two"], 0), &[]).unwrap();
        assert_eq!((sample.images.len(), sample.spans.len()), (0, 1));
    }

    #[test]
    fn what_is_too_long_loses_whole_turns_from_its_end() {
        let mut maker = tiny();
        let record = record(&["What? <image>", "a star", "And <image>?", "a circle"], 2);
        let images = [picture(), picture()];
        let whole = maker.conversation(&record, &images).unwrap();
        maker.preparation.max_length = whole.input_ids.len();
        assert_eq!(maker.conversation(&record, &images).unwrap(), whole);
        maker.preparation.max_length -= 1;
        let cut = maker.conversation(&record, &images).unwrap();
        assert_eq!((cut.images.len(), cut.questions.len()), (1, 1));
        assert_eq!((cut.cut_answers, whole.cut_answers), (1, 0));
        assert_eq!(cut.input_ids, whole.input_ids[..cut.input_ids.len()]);
        assert_eq!(cut.targets, whole.targets[..cut.input_ids.len()]);
        maker.preparation.max_length = cut.input_ids.len() - 1;
        let message = format!("{:#}", maker.conversation(&record, &images).unwrap_err());
        assert!(message.starts_with("sample r: it has ") && message.contains("up to its first answer"), "{message}");
        let message = format!(
            "{:#}",
            maker
                .packed(
                    "p".to_owned(),
                    &picture(),
                    vec![question("What color is the very first star, and where is it?", "red")]
                )
                .unwrap_err()
        );
        assert!(message.starts_with("sample p: it has ") && message.contains("max_seq_len allows"), "{message}");
    }

    #[test]
    fn pictures_are_cut_into_whole_patches() {
        let maker = SampleMaker::new(Preparation { patch_size: 3, ..preparation::tests::tiny() });
        let message = format!("{:#}", maker.conversation(&record(&["x", "y"], 1), &[picture()]).unwrap_err());
        assert!(message.contains("image 0 has 8 x 8 pixels") && message.contains("patches of 3"), "{message}");
    }

    #[test]
    fn marks_stand_around_every_picture() {
        let (plain, marked) = (tiny(), SampleMaker::new(preparation::tests::tiny().with_image_marks(Some((7, 8)))));
        let record = record(&["<image>And <image>?", "two"], 2);
        let sample = |maker: &SampleMaker| maker.conversation(&record, &[picture(), picture()]).unwrap();
        let (plain, marked) = (sample(&plain), sample(&marked));
        let mut place = 0;
        let mut around = Vec::new();
        for span in &marked.spans {
            let end = place + span.len() as usize;
            if matches!(span.modality(), Modality::Image { .. }) {
                around.push((marked.input_ids[place - 1], marked.input_ids[end]));
            }
            place = end;
        }
        assert_eq!(around, [(7, 8), (7, 8)]);
        assert_eq!(marked.input_ids.len(), plain.input_ids.len() + 4);
        let supervised = |sample: &Sample| sample.targets.iter().filter(|t| **t != IGNORE_INDEX).count();
        assert_eq!(supervised(&marked), supervised(&plain));
    }

    #[test]
    fn a_picture_comes_before_its_question() {
        let folder = fixtures::root().join("tiny/tokenizer");
        let template = "{% for m in messages %}{% if m.role == 'user' %}{{ messages[-1].content[:1] }}{% endif %}\
                        {{ m.content }}<|im_end|>{% endfor %}";
        let chat = Arc::new(ChatTemplate::new(template, Vec::new(), folder.display()).unwrap());
        let maker = SampleMaker::new(Preparation { chat, ..preparation::tests::tiny() });
        let questions = vec![question("What?", "red"), question("What?", "blue")];
        assert!(maker.packed("p".to_owned(), &picture(), questions).is_err());
    }
}
