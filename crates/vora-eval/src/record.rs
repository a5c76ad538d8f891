//! A record of an evaluation file: a conversation as for training, or a question with its answers, or captions.

use anyhow::{Context, Result, anyhow, bail};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use vora_data::NO_MARK;
use vora_data::{Record, RecordKeys};
use vora_text::{Message, Part};

use crate::question::{Question, text_of};

/// What a record asks, and what of it was not taken as it stands.
#[derive(Debug)]
pub(crate) struct Asked {
    pub(crate) questions: Vec<Question>,
    pub(crate) notes: Vec<String>,
}

/// An answer: text or a number, alone or as VQAv2 has it.
#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "expected an answer: text, a number, or an object with `answer`")]
enum Answer {
    Text(String),
    Number(serde_json::Number),
    Given { answer: Box<Answer> },
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected one or a list of them, each text, a number, or an object with `answer`")]
enum OneOrMore<T> {
    One(T),
    More(Vec<T>),
}

/// The keys of a record that training has no use for.
#[derive(Debug)]
struct Extra {
    id: Option<String>,
    kind: Option<String>,
    question: Option<String>,
    answers: Vec<String>,
    captions: Vec<String>,
}

impl Asked {
    /// Reads one record. Its pictures and its turns are what they are in training.
    ///
    /// # Errors
    /// Says what is wrong, but not where.
    pub(crate) fn read(line: &[u8], place: &str) -> Result<Self> {
        let keys = RecordKeys::default();
        let Ok(Value::Object(mut object)) = serde_json::from_slice(line) else {
            Record::parse(line, &keys)?; // which says what is wrong
            bail!("it is not a JSON object");
        };
        let has_turns = [keys.conversations.as_str(), "messages"].iter().any(|key| is_given(object.get(*key)));
        let extra = Extra::take(&mut object, has_turns)?;
        if let (Some(question), false) = (&extra.question, has_turns) {
            let answer = extra.answers.first().context("its `question` has neither `answer` nor `answers`")?;
            let turns = json!([{"from": "human", "value": question}, {"from": "gpt", "value": answer}]);
            object.insert(keys.conversations.clone(), turns);
        } else if let (Some(caption), false) = (extra.captions.first(), has_turns) {
            object.insert("caption".to_owned(), caption.as_str().into());
        }
        let mut record = Record::parse(&serde_json::to_vec(&object)?, &keys)?;
        if !has_turns {
            let unmarked = record.notes.len();
            record.notes.retain(|note| note != NO_MARK); // nobody marks a picture's place in such a question
            if let (Some(question), [_], Some(first)) = (&extra.question, &*record.frames, record.messages.first_mut())
                && record.notes.len() < unmarked
            {
                *first = Message::question_about(1, question); // as `vora ask` puts it
            }
        }
        let notes = std::mem::take(&mut record.notes);
        Ok(Self { questions: extra.questions(record, place), notes })
    }
}

impl Extra {
    /// Where there are no turns, POPE's `text` and `label` are a question and its answer.
    fn take(object: &mut Map<String, Value>, has_turns: bool) -> Result<Self> {
        let is_pope = !has_turns && !is_given(object.get("question")) && is_given(object.get("label"));
        let (question, answer) = if is_pope { ("text", "label") } else { ("question", "answer") };
        let question = take(object, question)?;
        let mut answers: Vec<Answer> = list(object, "answers")?;
        if let Some(answer) = take(object, answer)?.filter(|_| !has_turns && answers.is_empty()) {
            answers = match answer {
                OneOrMore::One(answer) => vec![answer],
                OneOrMore::More(answers) => answers,
            };
        }
        let mut captions = list(object, "captions")?;
        if captions.is_empty() && !has_turns && question.is_none() {
            captions = list(object, "caption")?;
        }
        let text = |value: Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        Ok(Self {
            id: take(object, "question_id")?.map(text),
            kind: take(object, "kind")?.map(text),
            question,
            answers: answers.into_iter().map(Answer::text).collect(),
            captions,
        })
    }

    fn questions(self, record: Record, place: &str) -> Vec<Question> {
        let own = Some(record.id).filter(|id| !id.is_empty());
        let id = own.or(self.id).unwrap_or_else(|| place.to_owned());
        let mut questions = Vec::new();
        let mut said: Vec<Message> = Vec::new();
        for message in record.messages {
            if message.role == "assistant" {
                let places = said.iter().flat_map(|m| &m.content).filter(|part| **part == Part::Image).count();
                questions.push(Question {
                    id: id.clone(),
                    kind: self.kind.clone(),
                    messages: said.clone(),
                    pictures: record.frames[..places].to_vec(),
                    references: vec![text_of(&message)],
                    captions: self.captions.clone(),
                    has_question_key: self.question.is_some(),
                });
            }
            said.push(message);
        }
        if let [only] = questions.as_mut_slice()
            && !self.answers.is_empty()
        {
            only.references = self.answers;
        }
        questions
    }
}

impl Answer {
    fn text(self) -> String {
        match self {
            Self::Text(text) => text,
            Self::Number(number) => number.to_string(),
            Self::Given { answer } => answer.text(),
        }
    }
}

fn is_given(value: Option<&Value>) -> bool {
    value.is_some_and(|value| !value.is_null())
}

/// The value of a key, if it is there and not null.
fn take<T: DeserializeOwned>(object: &mut Map<String, Value>, key: &str) -> Result<Option<T>> {
    let value = object.remove(key).unwrap_or_default();
    serde_json::from_value(value).map_err(|_| anyhow!("its `{key}` is not as expected"))
}

/// The values of a key, of which there may be one without a list.
fn list<T: DeserializeOwned>(object: &mut Map<String, Value>, key: &str) -> Result<Vec<T>> {
    Ok(match take(object, key)? {
        None => Vec::new(),
        Some(OneOrMore::One(value)) => vec![value],
        Some(OneOrMore::More(values)) => values,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Id, question and references of a record's only question.
    fn read(record: &str) -> (String, String, Vec<String>) {
        let mut asked = Asked::read(record.as_bytes(), "here").unwrap();
        let question = asked.questions.pop().unwrap();
        assert!(asked.questions.is_empty() && question.pictures == ["a.png"], "{record}");
        (question.id.clone(), question.text(), question.references)
    }

    /// As one that is asked, and not in one line with its pictures, as a training record without a mark has them.
    #[test]
    fn a_question_stands_below_its_pictures() {
        let asked = |record: &str| Asked::read(record.as_bytes(), "here").unwrap().questions.remove(0).messages;
        let expected = [Message::question_about(1, "What?")];
        assert_eq!(asked(r#"{"image": "a.png", "question": "What?", "answer": "a"}"#), expected);
        assert_eq!(asked(r#"{"image": "a.png", "text": "What?", "label": "no"}"#), expected);
        let marked = asked(r#"{"image": "a.png", "question": "What? <image>", "answer": "a"}"#);
        assert_eq!(marked[0].content, [Part::Text("What? ".to_owned()), Part::Image]);
    }

    #[test]
    fn questions_have_their_answers_in_several_ways() {
        for (record, id, question, references) in [
            (r#"{"image": "a.png", "question": "What?", "answer": "red"}"#, "here", "What?", &["red"][..]),
            (r#"{"images": ["a.png"], "question": "How many?", "answer": 1}"#, "here", "How many?", &["1"]),
            (r#"{"frames": "a.png", "question": "What?", "answer": ["a", "b"]}"#, "here", "What?", &["a", "b"]),
            (r#"{"id": 7, "image": {"path": "a.png"}, "question": "What?", "answers": "a"}"#, "7", "What?", &["a"]),
            (
                r#"{"question_id": 9, "image": "a.png", "question": "What?",
                    "answers": [{"answer": "x", "answer_confidence": "yes"}, {"answer": 2}]}"#,
                "9",
                "What?",
                &["x", "2"],
            ),
            (r#"{"question_id": "p", "image": "a.png", "text": "A ring?", "label": "no"}"#, "p", "A ring?", &["no"]),
            (r#"{"image": "a.png", "caption": "A ring."}"#, "here", "", &["A ring."]),
            (r#"{"image": "a.png", "captions": ["A ring.", "A red ring."]}"#, "here", "", &["A ring."]),
        ] {
            let (found_id, found, answers) = read(record);
            assert_eq!((found_id.as_str(), found.as_str()), (id, question), "{record}");
            assert_eq!(answers, references, "{record}");
        }
    }

    #[test]
    fn what_is_refused_is_named() {
        for (record, says) in [
            (r#"{"image": "a.png", "question": "What?"}"#, "its `question` has neither `answer` nor `answers`"),
            (r#"{"image": "a.png", "question": 3, "answer": "a"}"#, "its `question` is not as expected"),
            (r#"{"image": "a.png", "question": "What?", "answer": {"a": 1}}"#, "its `answer` is not as expected"),
            (r#"{"image": "https://a.org/b.png", "question": "What?", "answer": "a"}"#, "is an address"),
            (r#"{"img_path": "a.png", "question": "What?", "answer": "a"}"#, "its `img_path` names a picture"),
            (r#"["a"]"#, "not a record"),
        ] {
            let error = format!("{:#}", Asked::read(record.as_bytes(), "here").unwrap_err());
            assert!(error.contains(says), "{record}: {error}");
        }
    }

    #[test]
    fn what_is_not_taken_is_noted() {
        let notes = |record: &str| Asked::read(record.as_bytes(), "here").unwrap().notes;
        let turns =
            r#""messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A ring."}]"#;
        assert!(notes(r#"{"image": "a.png", "question": "What?", "answer": "a"}"#).is_empty());
        assert_eq!(notes(&format!(r#"{{"image": "a.png", {turns}}}"#)), [NO_MARK]);
        let thumb = r#"{"image": "a.png", "thumb_img": "b.png", "question": "What?", "answer": "a"}"#;
        assert_eq!(notes(thumb), ["its `thumb_img` is not read"]);
    }
}
