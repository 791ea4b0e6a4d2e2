//! Topics and topic filters (MQTT 3.1.1 section 4.7), as text from clients.

/// Whether a message can have this topic.
pub fn is_topic(text: &str) -> bool {
    is_text(text) && !text.contains(['+', '#'])
}

/// Whether it can be subscribed to.
pub fn is_filter(text: &str) -> bool {
    let whole_level = |level: &str| level == "+" || level == "#" || !level.contains(['+', '#']);
    let inner = text.rsplit_once('/').map_or("", |(before, _)| before);
    is_text(text) && text.split('/').all(whole_level) && !inner.contains('#')
}

fn is_text(text: &str) -> bool {
    !text.is_empty() && !text.contains('\0')
}

/// Whether `topic` matches `filter`.
pub fn matches(filter: &str, topic: &str) -> bool {
    covers(filter, topic)
}

/// Whether `filter` has every topic that `narrower` has; a topic is a filter that has one. A wildcard at the beginning
/// has no topic that begins with `$`.
pub fn covers(filter: &str, narrower: &str) -> bool {
    if narrower.starts_with('$') && filter.starts_with(['+', '#']) {
        return false;
    }
    let mut narrower = narrower.split('/');
    for level in filter.split('/') {
        match (level, narrower.next()) {
            // `a/#` has `a`, too.
            ("#", _) => return true,
            ("+", Some(level)) if level != "#" => {}
            (level, Some(other)) if level == other => {}
            (_, _) => return false,
        }
    }
    narrower.next().is_none()
}

/// The text that all topics of `filter` begin with.
pub fn prefix(filter: &str) -> &str {
    let literal = filter.find(['+', '#']).map_or(filter, |wildcard| &filter[..wildcard]);
    if literal.len() < filter.len() { literal.strip_suffix('/').unwrap_or(literal) } else { literal }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_standards_examples_match() {
        for (filter, topic, is_match) in [
            ("sport/tennis/player1/#", "sport/tennis/player1", true),
            ("sport/tennis/player1/#", "sport/tennis/player1/score/wimbledon", true),
            ("sport/#", "sport", true),
            ("sport/#", "sports", false),
            ("sport/tennis/+", "sport/tennis/player1", true),
            ("sport/tennis/+", "sport/tennis/player1/ranking", false),
            ("sport/+", "sport", false),
            ("sport/+", "sport/", true),
            ("+/+", "/finance", true),
            ("/+", "/finance", true),
            ("+", "/finance", false),
            ("#", "ü/x", true),
            ("#", "$SYS/uptime", false),
            ("+/uptime", "$SYS/uptime", false),
            ("$SYS/#", "$SYS/uptime", true),
            ("a/b", "a/b", true),
            ("a/b", "a/B", false),
        ] {
            assert_eq!(matches(filter, topic), is_match, "{filter} {topic}");
        }
    }

    #[test]
    fn bad_filters_and_topics_are_known() {
        for filter in ["#", "+", "a/#", "+/a/+", "/", "ü", "a//b", "$share/g/a"] {
            assert!(is_filter(filter), "{filter}");
        }
        for filter in ["", "a#/b", "#/a", "a/#/b", "a+", "+a/b", "a/b#", "##", "++", "a\0"] {
            assert!(!is_filter(filter), "{filter:?}");
        }
        for topic in ["", "+", "a/#", "a+b", "\0"] {
            assert!(!is_topic(topic), "{topic:?}");
        }
        assert!(is_topic("ü/x") && is_topic("/") && is_topic("wireguard/ffmuc_welt/all"));
    }

    #[test]
    fn a_filter_covers_narrower_ones() {
        for (filter, narrower, is_covered) in [
            ("#", "#", true),
            ("#", "a/+/#", true),
            ("#", "$SYS/#", false),
            ("a/+", "a/+", true),
            ("a/+", "a/#", false),
            ("a/+/c", "a/b/c", true),
            ("a/+/c", "a/+/+", false),
            ("a/b", "a/+", false),
            ("+/+", "#", false),
            ("a/#", "a", true),
        ] {
            assert_eq!(covers(filter, narrower), is_covered, "{filter} {narrower}");
        }
    }

    proptest! {
        #[test]
        fn a_covering_filter_matches_all_topics_of_the_covered_one(
            filter in "[ab+$]{1,2}(/[ab+]){0,3}(/#)?|#",
            narrower in "[ab+$](/[ab+]){0,3}(/#)?|#",
            topic in "[ab$](/[ab]){0,4}",
        ) {
            prop_assume!(is_filter(&filter) && is_filter(&narrower));
            if covers(&filter, &narrower) && matches(&narrower, &topic) {
                prop_assert!(matches(&filter, &topic));
            }
            if matches(&filter, &topic) {
                prop_assert!(topic.starts_with(prefix(&filter)));
            }
        }

        #[test]
        fn no_text_makes_it_panic(filter in any::<String>(), topic in any::<String>()) {
            let _ = (is_filter(&filter), is_topic(&topic), matches(&filter, &topic), prefix(&filter));
        }
    }
}
