//! A chat template as other programs need it to show pictures: many know nothing but strings, and HF's processors hand
//! over lists of parts.

/// What stands for a picture in a string.
pub(super) const IMAGE_TOKEN: &str = "<image>";

/// Begins the lines that make strings of parts. A picture stands on a line of its own, as in the records that VoRAs are
/// trained on; between the two halves the roles are listed that the template takes as a list of one text.
const BEGIN: &str = "\
{#- A list of parts becomes one text, with <image> on a line of its own for a picture; then the model's own template. #}
{%- set lists = [";
const END: &str = "] %}
{%- set turns = namespace(all=[]) %}
{%- for message in messages %}
    {%- set said = namespace(text='', last=none) %}
    {%- if message.content is string or message.content is not iterable %}
        {%- set said.text = message.content %}
    {%- else %}
        {%- for part in message.content %}
            {%- set text = '<image>' if part.type == 'image' else part.text %}
            {%- set joined = said.last == none or said.last == part.type or part.type not in ['image', 'text'] %}
            {%- if not joined and not said.text.endswith('\\n') and not text.startswith('\\n') %}
                {%- set said.text = said.text + '\\n' %}
            {%- endif %}
            {%- set said.text = said.text + text %}
            {%- set said.last = part.type %}
        {%- endfor %}
    {%- endif %}
    {%- if message.role in lists and said.text is string %}
        {%- set said.text = [{'type': 'text', 'text': said.text}] %}
    {%- endif %}
    {%- set turns.all = turns.all + [dict(message, content=said.text)] %}
{%- endfor %}
{%- set messages = turns.all %}
{{- '' }}";

/// The template without the lines that [`with_parts`] put before it.
pub(super) fn without_parts(source: &str) -> &str {
    let rest = source.strip_prefix(BEGIN).and_then(|rest| rest.split_once(END));
    rest.map_or(source, |(_, own)| own)
}

/// The template with these lines before it, for one that takes the content of the roles `lists` as a list.
pub(super) fn with_parts<'a>(source: &str, lists: impl Iterator<Item = &'a str>) -> String {
    let lists: Vec<String> = lists.map(|role| format!("'{role}'")).collect();
    format!("{BEGIN}{}{END}{source}", lists.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ChatTemplate;
    use minijinja::Value;

    const STRINGS: &str = "\n{% for m in messages %}[{{ m.role }}]{{ m.content.strip() }}{% endfor %}";
    const LISTS: &str = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %};{% endfor %}";
    const PICTURES: &str = "{% for m in messages %}{% for p in m.content %}\
        {% if p.type == 'image' %}<|begin|><|pad|><|end|>{% else %}{{ p.text }}{% endif %}{% endfor %}{% endfor %}";

    fn template(source: &str) -> ChatTemplate {
        ChatTemplate::new(source, Vec::new(), "test").unwrap()
    }

    #[test]
    fn a_template_with_pictures_is_read_as_the_one_within() {
        for source in [STRINGS, LISTS] {
            let (with, token) = template(source).with_pictures().unwrap();
            assert_eq!((without_parts(&with), token.as_str()), (source, "<image>"));
            assert_ne!(with, source);
        }
        let (with, token) = template(PICTURES).with_pictures().unwrap();
        assert_eq!((with.as_str(), token.as_str()), (PICTURES, "<|pad|>"));
    }

    fn part(pairs: &[(&'static str, &'static str)]) -> Value {
        Value::from_pairs(pairs.iter().copied())
    }

    #[test]
    fn parts_become_what_the_template_takes() {
        let render = |source: &str, content: Value| {
            let (with, _) = template(source).with_pictures().unwrap();
            let environment = &template(&with).environments[0];
            let message = Value::from_pairs([("role", Value::from("user")), ("content", content)]);
            let context = minijinja::context! { messages => vec![message] };
            environment.get_template("chat_template").unwrap().render(context).unwrap()
        };
        let image = || part(&[("type", "image")]);
        let text = |said: &'static str| part(&[("type", "text"), ("text", said)]);
        for (content, expected) in [
            (vec![image(), text("a")], "<image>\na"),
            (vec![image(), image(), text("\na")], "<image><image>\na"),
            (vec![text("a"), text("b"), image(), text("c")], "ab\n<image>\nc"),
            (vec![text("a\n"), image()], "a\n<image>"),
            (vec![text("a")], "a"),
        ] {
            assert_eq!(render(STRINGS, Value::from(content.clone())), format!("\n[user]{expected}"));
            assert_eq!(render(LISTS, Value::from(content)), format!("{expected};"));
        }
        assert_eq!((render(STRINGS, "a".into()), render(LISTS, "a".into())), ("\n[user]a".to_owned(), "a;".to_owned()));
    }
}
