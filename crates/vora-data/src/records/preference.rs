//! Preference records as TRL has them: a prompt, the answer that was chosen, and the one that was rejected.
//!
//! `{"images": ["a.jpg"], "prompt": [{"role": "user", "content": "What is it?"}], "chosen": [{"role": "assistant",
//! "content": "A cat."}], "rejected": ..}`. Each of the three may be a string, which is one turn; and without a `prompt`,
//! or with it, `chosen` and `rejected` may be whole conversations, which are the same up to their last answer.

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::{Map, Value};

use super::turns::{RawText, RawTurn};

/// The keys of a preference record.
pub(super) const KEYS: [&str; 3] = ["prompt", "chosen", "rejected"];

/// A preference as a record has it.
pub(super) struct RawPreference {
    /// The prompt, and the answer that was chosen.
    pub(super) chosen: Vec<RawTurn>,
    /// The prompt, and the answer that was rejected.
    pub(super) rejected: Vec<RawTurn>,
}

/// Whether the record has both answers.
pub(super) fn is_preference(object: &Map<String, Value>) -> bool {
    KEYS[1..].iter().all(|key| is_said(object, key))
}

/// Whether a key has words.
fn is_said(object: &Map<String, Value>, key: &str) -> bool {
    object.get(key).is_some_and(|value| match value {
        Value::Null => false,
        Value::String(text) => !text.is_empty(),
        Value::Array(turns) => !turns.is_empty(),
        _ => true,
    })
}

impl RawPreference {
    /// Takes the preference out of a record; none where it has neither answer.
    pub(super) fn take(object: &mut Map<String, Value>) -> Result<Option<Self>> {
        match [is_said(object, "chosen"), is_said(object, "rejected")] {
            [false, false] => return Ok(None),
            [true, false] => bail!("it has a `chosen` answer and no `rejected` one"),
            [false, true] => bail!("it has a `rejected` answer and no `chosen` one"),
            [true, true] => {}
        }
        let prompt = match object.remove("prompt").filter(|prompt| !prompt.is_null()) {
            Some(prompt) => turns("prompt", prompt, "user")?,
            None => Vec::new(),
        };
        let mut whole = |key| {
            let said = turns(key, object.remove(key).unwrap_or_default(), "assistant")?;
            whole(key, &prompt, said)
        };
        let (chosen, rejected) = (whole("chosen")?, whole("rejected")?);
        let turn = 1 + prompt_of(&chosen).iter().zip(prompt_of(&rejected)).take_while(|(a, b)| a == b).count();
        ensure!(
            prompt_of(&chosen) == prompt_of(&rejected),
            "its `chosen` and `rejected` answer different prompts: they differ in turn {turn}, before the last answer"
        );
        Ok(Some(Self { chosen, rejected }))
    }
}

/// What comes before the last turn.
fn prompt_of(turns: &[RawTurn]) -> &[RawTurn] {
    &turns[..turns.len() - 1]
}

/// Turns, or a string that is one turn of `role`.
fn turns(key: &str, value: Value, role: &str) -> Result<Vec<RawTurn>> {
    match value {
        Value::String(text) => Ok(vec![RawTurn { from: role.to_owned(), value: RawText::Whole(text) }]),
        turns => serde_json::from_value(turns).map_err(|e| anyhow!("its `{key}` is not as expected: {e}")),
    }
}

/// A conversation that begins with the prompt, whether or not `said` has it again.
fn whole(key: &str, prompt: &[RawTurn], said: Vec<RawTurn>) -> Result<Vec<RawTurn>> {
    let last = said.last().with_context(|| format!("its `{key}` has no turn"))?;
    ensure!(["assistant", "gpt"].contains(&last.from.as_str()), "the last turn of its `{key}` is from `{}`", last.from);
    if said.len() == 1 {
        ensure!(!prompt.is_empty(), "its `{key}` is an answer alone, and it has no `prompt`");
        return Ok(prompt.iter().cloned().chain(said).collect());
    }
    ensure!(
        said.starts_with(prompt) && said.len() > prompt.len(),
        "its `{key}` has {} turns and does not begin with its `prompt`",
        said.len()
    );
    Ok(said)
}

#[cfg(test)]
mod tests {
    use vora_text::{Message, Part};

    use super::super::{Record, RecordKeys};
    use super::*;

    const PROMPT: &str = r#""prompt": [{"role": "user", "content": "What is it?"}]"#;
    const CAT: &str = r#"{"role": "assistant", "content": "A cat."}"#;
    const DOG: &str = r#"{"role": "assistant", "content": "A dog."}"#;

    fn parse(line: &str) -> Result<Record> {
        Record::parse(line.as_bytes(), &RecordKeys::default())
    }

    /// The forms that TRL reads: messages or strings, content whole or in parts, the prompt explicit or in both answers.
    #[test]
    fn one_preference_is_written_in_several_ways() {
        let images = r#""images": ["a.png"]"#;
        let parts = r#"[{"role": "user", "content": [{"type": "image", "text": null}, {"type": "text", "text": "What is it?"}]}]"#;
        let in_parts =
            |text: &str| format!(r#"[{{"role": "assistant", "content": [{{"type": "text", "text": "{text}"}}]}}]"#);
        let whole = |answer: &str| format!(r#"[{}, {answer}]"#, &parts[1..parts.len() - 1]);
        let forms = [
            format!(r#"{{{images}, {PROMPT}, "chosen": [{CAT}], "rejected": [{DOG}]}}"#),
            format!(r#"{{{images}, "prompt": "What is it?", "chosen": "A cat.", "rejected": "A dog."}}"#),
            format!(
                r#"{{{images}, "prompt": {parts}, "chosen": {}, "rejected": {}}}"#,
                in_parts("A cat."),
                in_parts("A dog.")
            ),
            format!(r#"{{{images}, "chosen": {}, "rejected": {}}}"#, whole(CAT), whole(DOG)),
            format!(r#"{{{images}, "prompt": {parts}, "chosen": {}, "rejected": [{DOG}]}}"#, whole(CAT)),
            format!(r#"{{"image": "a.png", "messages": [], {PROMPT}, "chosen": [{CAT}], "rejected": "A dog."}}"#),
        ];
        for form in forms {
            let record = parse(&form).unwrap();
            assert_eq!(record.messages[0].content, [Part::Image, Part::Text("What is it?".to_owned())], "{form}");
            assert_eq!(record.messages[1..], [Message::new("assistant", "A cat.")], "{form}");
            assert_eq!(
                (record.rejected, record.frames),
                (Some(Message::new("assistant", "A dog.")), vec!["a.png".to_owned()])
            );
        }
        // Turns before the last answer are the prompt's, an assistant's among them.
        let turns = |last: &str| {
            format!(r#"[{{"role": "user", "content": "Hi"}}, {CAT}, {{"role": "user", "content": "Sure?"}}, {last}]"#)
        };
        let record = parse(&format!(r#"{{"chosen": {}, "rejected": {}}}"#, turns(CAT), turns(DOG))).unwrap();
        assert_eq!((record.messages.len(), record.rejected), (4, Some(Message::new("assistant", "A dog."))));
        // A conversation beside one answer alone is a conversation.
        let record = parse(&format!(r#"{{"messages": {}, "chosen": "A cat."}}"#, turns(DOG))).unwrap();
        assert_eq!((record.messages.len(), record.rejected), (4, None));
    }

    #[test]
    fn errors_say_what_is_wrong() {
        let says = |line: &str, text: &str| {
            let message = format!("{:#}", parse(line).unwrap_err());
            assert!(message.contains(text), "`{message}` lacks `{text}`");
        };
        let user = r#"{"role": "user", "content": "Hi"}"#;
        let other = r#"{"role": "user", "content": "Ho"}"#;
        says(&format!(r#"{{{PROMPT}, "chosen": [{CAT}]}}"#), "a `chosen` answer and no `rejected` one");
        says(&format!(r#"{{{PROMPT}, "chosen": [{CAT}], "rejected": []}}"#), "a `chosen` answer and no `rejected` one");
        says(&format!(r#"{{{PROMPT}, "rejected": "A dog."}}"#), "a `rejected` answer and no `chosen` one");
        says(&format!(r#"{{{PROMPT}, "chosen": [{CAT}], "rejected": " A cat."}}"#), "are the same answer");
        says(&format!(r#"{{"chosen": [{CAT}], "rejected": [{DOG}]}}"#), "an answer alone, and it has no `prompt`");
        says(
            &format!(r#"{{"chosen": [{user}, {CAT}], "rejected": [{other}, {DOG}]}}"#),
            "answer different prompts: they differ in turn 1",
        );
        says(
            &format!(r#"{{{PROMPT}, "chosen": [{user}, {CAT}], "rejected": [{DOG}]}}"#),
            "does not begin with its `prompt`",
        );
        says(
            &format!(r#"{{{PROMPT}, "chosen": [{user}], "rejected": [{DOG}]}}"#),
            "the last turn of its `chosen` is from `user`",
        );
        says(&format!(r#"{{{PROMPT}, "chosen": 3, "rejected": [{DOG}]}}"#), "its `chosen` is not as expected");
        let mark = r#""prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]"#;
        says(
            &format!(r#"{{{mark}, "chosen": [{CAT}], "rejected": [{DOG}]}}"#),
            "1 places `<image>` in the questions, 0 images",
        );
    }
}
