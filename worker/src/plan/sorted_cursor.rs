//! Membership in a sorted sequence, queried in order: a map of all peers of an interface would cost more than the
//! comparison.

use std::iter::Peekable;

/// Looks up many items in a sorted sequence, in the same order: one pass is enough.
pub struct SortedCursor<'a, T: 'a, I: Iterator<Item = &'a T>>(Peekable<I>);

impl<'a, T: Ord + 'a, I: Iterator<Item = &'a T>> SortedCursor<'a, T, I> {
    /// A cursor over these items, which must be sorted.
    pub fn new(items: impl IntoIterator<IntoIter = I>) -> Self {
        Self(items.into_iter().peekable())
    }

    /// Whether `item` is in the sequence; it must not be less than the item of the last call.
    pub fn has(&mut self, item: &T) -> bool {
        while self.0.next_if(|other| *other < item).is_some() {}
        self.0.peek().is_some_and(|other| *other == item)
    }
}
