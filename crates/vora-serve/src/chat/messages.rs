//! A request's turns as a chat template takes them, and where its pictures come from.

use std::mem::take;

use vora_text::{Message, Part};

use super::wire::{OneOrMore, WireMessage, WirePart};
use crate::error::ApiError;

/// A conversation, and the pictures in the order of their places.
#[derive(Debug)]
pub(super) struct Conversation {
    pub(super) messages: Vec<Message>,
    pub(super) pictures: Vec<PictureSource>,
}

/// A picture that has not been looked at.
#[derive(Debug)]
pub(super) struct PictureSource {
    /// The request's field that it came by.
    pub(super) param: String,
    pub(super) url: String,
}

impl Conversation {
    /// Checks roles and parts.
    ///
    /// # Errors
    /// Names the first field that is wrong.
    pub(super) fn of(wire: Vec<WireMessage>, max_pictures: usize) -> Result<Self, ApiError> {
        if wire.is_empty() {
            return Err(ApiError::invalid("messages", "messages is empty: there is nothing to answer"));
        }
        let mut pictures = Vec::new();
        let messages = wire.into_iter().enumerate();
        let messages = messages.map(|(at, message)| turn(at, message, &mut pictures)).collect::<Result<_, _>>()?;
        if pictures.len() > max_pictures {
            let message = format!("there are {} pictures, at most {max_pictures} may be", pictures.len());
            return Err(ApiError::invalid(pictures[max_pictures].param.clone(), message));
        }
        Ok(Self { messages, pictures })
    }

    /// Bytes of all words.
    pub(super) fn text_len(&self) -> usize {
        let parts = self.messages.iter().flat_map(|message| &message.content);
        parts.map(|part| if let Part::Text(text) = part { text.len() } else { 0 }).sum()
    }
}

fn turn(at: usize, wire: WireMessage, pictures: &mut Vec<PictureSource>) -> Result<Message, ApiError> {
    let role = match &*wire.role {
        "system" | "developer" => "system",
        "user" => "user",
        "assistant" => "assistant",
        _ => {
            let param = format!("messages[{at}].role");
            let message = format!("{param} is none of system, developer, user and assistant");
            return Err(ApiError::invalid(param, message));
        }
    };
    let parts = match wire.content {
        Some(OneOrMore::One(text)) => return Ok(Message::new(role, text)),
        Some(OneOrMore::More(parts)) => parts,
        None if role == "assistant" => return Ok(Message::new(role, "")),
        None => {
            let param = format!("messages[{at}].content");
            return Err(ApiError::invalid(param.clone(), format!("{param} is missing")));
        }
    };
    let mut content = Vec::with_capacity(parts.len());
    for (index, part) in parts.into_iter().enumerate() {
        let param = format!("messages[{at}].content[{index}]");
        content.push(match picture_or_text(&param, part)? {
            Ok(text) => Part::Text(text),
            Err(_) if role != "user" => {
                return Err(ApiError::invalid(param, "pictures may stand in a user's turn alone"));
            }
            Err(url) => {
                pictures.push(PictureSource { param, url });
                Part::Image
            }
        });
    }
    Ok(Message::of_parts(role, as_trained(content)))
}

/// The text of a part, or else the address of its picture.
fn picture_or_text(param: &str, part: WirePart) -> Result<Result<String, String>, ApiError> {
    let missing = |field: &str| ApiError::invalid(format!("{param}.{field}"), format!("{param}.{field} is missing"));
    match &*part.r#type {
        "text" => part.text.map(Ok).ok_or_else(|| missing("text")),
        "image_url" => part.image_url.map(|image| Err(image.url)).ok_or_else(|| missing("image_url")),
        _ => Err(ApiError::invalid(format!("{param}.type"), format!("{param}.type is neither text nor image_url"))),
    }
}

/// A model was trained on pictures with the question on a line below: that is how a turn of one text and pictures is put,
/// whichever came first. Where several texts stand among the pictures, each keeps its place.
fn as_trained(mut content: Vec<Part>) -> Vec<Part> {
    let texts = content.iter().filter(|part| matches!(part, Part::Text(_))).count();
    if texts == content.len() {
        return content;
    }
    if texts == 1 {
        content.sort_by_key(|part| matches!(part, Part::Text(_))); // stable: pictures keep their order
    }
    for at in 1..content.len() {
        let (before, after) = content.split_at_mut(at);
        if let (Some(Part::Image), Part::Text(text)) = (before.last(), &mut after[0])
            && !text.starts_with('\n')
        {
            *text = format!("\n{}", take(text));
        }
    }
    content
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_about_pictures_is_put_as_trained() {
        let text = |text: &str| Part::Text(text.to_owned());
        let as_asked = Message::question_about(2, "Why?").content;
        for order in [
            vec![Part::Image, Part::Image, text("Why?")],
            vec![text("Why?"), Part::Image, Part::Image],
            vec![Part::Image, text("\nWhy?"), Part::Image],
        ] {
            assert_eq!(as_trained(order), as_asked);
        }
        let among = as_trained(vec![text("Here:"), Part::Image, text("and"), Part::Image]);
        assert_eq!(among, [text("Here:"), Part::Image, text("\nand"), Part::Image]);
    }
}
