//! Just enough of Jinja's lexical rules to find tags, strings and brackets. What cannot be read here is refused, so
//! that nothing reaches the engine unread.

/// A tag, and the text around it.
pub struct Tag<'a> {
    /// Text before it, comments included.
    pub before: &'a str,
    /// `{{` or `{%`.
    pub open: &'a str,
    pub body: &'a str,
    pub close: &'a str,
    pub after: &'a str,
}

/// The next tag of a text.
pub fn next_tag(text: &str) -> Result<Option<Tag<'_>>, String> {
    let mut from = 0usize;
    loop {
        let Some(found) = text.get(from..).and_then(|t| t.find('{')) else { return Ok(None) };
        let start = from.saturating_add(found);
        let body_start = start.saturating_add(2);
        let inside = text.get(body_start..).unwrap_or_default();
        match text.get(start..body_start) {
            Some("{#") => {
                let end = inside.find("#}").ok_or("a comment is not closed")?;
                from = body_start.saturating_add(end).saturating_add(2);
            }
            Some(open @ ("{{" | "{%")) => {
                let close = if open == "{{" { "}}" } else { "%}" };
                let len = body_len(inside, close).ok_or_else(|| format!("a tag is not closed: {open}"))?;
                let (body, rest) = inside.split_at_checked(len).ok_or("it cannot be read")?;
                let (close, after) = rest.split_at_checked(close.len()).ok_or("it cannot be read")?;
                return Ok(Some(Tag { before: text.get(..start).unwrap_or_default(), open, body, close, after }));
            }
            _ => from = start.saturating_add(1),
        }
    }
}

/// Length of a tag's body: up to the closing mark that is in no string and no bracket.
fn body_len(text: &str, close: &str) -> Option<usize> {
    let (mut at, mut depth) = (0usize, 0usize);
    while let Some(rest) = text.get(at..).filter(|r| !r.is_empty()) {
        if depth == 0 && rest.starts_with(close) {
            return Some(at);
        }
        match rest.as_bytes().first()? {
            b'(' | b'[' | b'{' => depth = depth.saturating_add(1),
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        at = at.saturating_add(token_len(rest));
    }
    None
}

/// Length of the token at the start of a text: a string, a word or number, blanks, an operator of two signs, or one
/// sign.
pub fn token_len(text: &str) -> usize {
    let Some(first) = text.chars().next() else { return 0 };
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    if first == '"' || first == '\'' {
        let mut escaped = false;
        let closing = text.char_indices().skip(1).find(|(_, c)| {
            let closes = !escaped && *c == first;
            escaped = !escaped && *c == '\\';
            closes
        });
        return closing.map_or(text.len(), |(at, _)| at.saturating_add(1));
    }
    if is_word(first) {
        return text.find(|c| !is_word(c)).unwrap_or(text.len());
    }
    if first.is_whitespace() {
        return text.find(|c: char| !c.is_whitespace()).unwrap_or(text.len());
    }
    let pairs = ["//", "**", "==", "!=", "<=", ">="];
    if pairs.iter().any(|pair| text.starts_with(pair)) { 2 } else { first.len_utf8() }
}

/// A tag's body without the marks for blank control at its ends, and those marks.
pub fn strip_marks(body: &str) -> (&str, &str, &str) {
    let n_head = if body.starts_with(['-', '+']) { 1 } else { 0 };
    let (head, rest) = body.split_at_checked(n_head).unwrap_or(("", body));
    let n_inner = if rest.ends_with(['-', '+']) { rest.len().saturating_sub(1) } else { rest.len() };
    let (inner, tail) = rest.split_at_checked(n_inner).unwrap_or((rest, ""));
    (head, inner, tail)
}

/// Where the end tag of a raw block starts.
pub fn raw_end(text: &str) -> usize {
    let mut from = 0usize;
    while let Some(found) = text.get(from..).and_then(|t| t.find("{%")) {
        let start = from.saturating_add(found);
        from = start.saturating_add(2);
        let inside = text.get(from..).unwrap_or_default();
        let body = inside.find("%}").and_then(|end| inside.get(..end));
        if body.is_some_and(|b| strip_marks(b).1.trim() == "endraw") {
            return start;
        }
    }
    text.len()
}
