//! One offline HTML page.
