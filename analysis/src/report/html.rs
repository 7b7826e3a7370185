//! Text to markup. Everything that comes from a file goes through [`escape`].

/// Text as it may stand between tags and in quoted attributes. Control characters, which HTML forbids, become spaces.
pub(crate) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c if c.is_control() => out.push(' '),
            c => out.push(c),
        }
    }
    out
}

/// The page's only style sheet. Colours are variables, so that charts follow the theme.
pub(crate) fn style() -> String {
    use crate::plots::{DARK, LIGHT};
    let (light, dark) = (variables(&LIGHT), variables(&DARK));
    format!(
        ":root{{color-scheme:light dark;{light}}}\n\
         @media (prefers-color-scheme:dark){{:root{{{dark}}}}}\n{STYLE}"
    )
}

fn variables(palette: &crate::plots::Palette) -> String {
    let colour = |[r, g, b]: [u8; 3]| format!("#{r:02x}{g:02x}{b:02x}");
    let series = palette.series.iter().enumerate().map(|(i, c)| format!("--series-{i}:{};", colour(*c)));
    let [background, text, grid] = [palette.background, palette.text, palette.grid].map(colour);
    format!("--background:{background};--text:{text};--grid:{grid};{}", series.collect::<String>())
}

const STYLE: &str = "\
body{background:var(--background);color:var(--text);font:15px/1.5 system-ui,sans-serif;max-width:62rem;\
margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem;margin:0 0 .2rem}
h2{font-size:1.25rem;margin:2.6rem 0 .6rem;border-bottom:1px solid var(--grid);padding-bottom:.2rem}
nav a{margin-right:1rem;color:var(--series-0)}
figure{margin:1.2rem 0}
figure svg{width:100%;height:auto;display:block}
figcaption{margin:.3rem 0 0;opacity:.85}
.scroll{overflow-x:auto;margin:1rem 0}
table{border-collapse:collapse;font-size:.82rem;font-variant-numeric:tabular-nums}
caption{text-align:left;padding-bottom:.3rem;opacity:.85}
th,td{padding:.18rem .6rem .18rem 0;text-align:right;border-bottom:1px solid var(--grid);white-space:nowrap}
th.text,td.text{text-align:left}
th{font-weight:600;vertical-align:bottom;white-space:normal}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.15rem 1.2rem;margin:1rem 0}
dt{opacity:.75}
dd{margin:0;overflow-wrap:anywhere}
code{font-size:.87rem;overflow-wrap:anywhere}
.missing{opacity:.75}
details{margin:1rem 0}
summary{cursor:pointer}
";

#[cfg(test)]
mod tests {
    #[test]
    fn markup_is_defused() {
        let hostile = "<script>alert('x' & \"y\")</script>\u{0}\n";
        assert_eq!(super::escape(hostile), "&lt;script&gt;alert(&#39;x&#39; &amp; &quot;y&quot;)&lt;/script&gt;  ");
    }
}
